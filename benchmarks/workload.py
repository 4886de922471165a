"""What the benchmarks run: the rows, ours as the program runs it, and which rows each step sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bert import BertConfig, find_checkpoint, read_config
from datasets import Rows, RowStream, TokenizedRows, Tokenizer, data_folder, read_examples
from engine import StageSettings, Trainer
from evaluation import Precision
from model import Layout, MultitaskBert, TaskModel, load_model
from pal import PalConfig
from pcgrad import make_treatment
from regularizers import Regularizer
from schedulers import RoundRobinScheduler, Setting
from seeding import derive_seed
from tasks import TASKS
from token_cache import tokenize_file

BATCH_SIZE = 32
SEED = 0
STAGE = "benchmark"
CPU = Precision(torch.device("cpu"))
Draw = tuple[str, np.ndarray]  # a task and the numbers of its rows


@dataclass(frozen=True)
class Checkpoint:
    """A folder with an encoder and its tokenizer."""

    folder: Path
    config: BertConfig

    @classmethod
    def find(cls, model: str) -> "Checkpoint":
        """Raises CheckpointError if there is none."""
        folder = find_checkpoint(model)
        return cls(folder, BertConfig.from_dict(read_config(folder), str(folder / "config.json")))

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder, self.config.max_position_embeddings)

    def rows(self, data: Path, split: str) -> dict[str, TokenizedRows]:
        """The rows of a split of all tasks. Raises DataError for a file that cannot be used."""
        folder, tokenizer = data_folder(str(data)), self.tokenizer()
        files = {task: read_examples(folder / task.file_name(split), task, labelled=True) for task in TASKS.values()}
        device = torch.device("cpu")
        return {task.name: tokenize_file(file, task, tokenizer, device).rows for task, file in files.items()}

    def model(self, tasks: Sequence[str], adapters: PalConfig | None = None) -> MultitaskBert:
        """The encoder with new heads, the same every time."""
        return load_model(self.folder, Layout(tuple(tasks), 0, adapters), torch.Generator().manual_seed(SEED)).model


class Silent:
    """A listener that does nothing."""

    stop_requested = False

    def on_step(self, record: Mapping[str, Any]) -> None: ...

    def on_evaluation(self, record: Mapping[str, Any], is_best: bool) -> None: ...

    def say(self, line: str) -> None: ...

    def save(self) -> None: ...

    def check_stop(self) -> None: ...


def make_trainer(
    model: TaskModel,
    shared: Mapping[str, nn.Parameter],
    of_tasks: Mapping[str, Mapping[str, nn.Parameter]],
    rows: Mapping[str, Rows],
    draws_per_step: int = 1,
    treatment: str = "sum",
    regularizers: Sequence[Regularizer] = (),
    precision: Precision = CPU,
    batch_size: int = BATCH_SIZE,
    embedding: str | None = None,
) -> Trainer:
    """A trainer that draws the tasks in turn, `draws_per_step` of them in a step."""
    tasks = tuple(rows)
    settings = StageSettings(
        name=STAGE,
        tasks=tasks,
        epochs=1,
        steps_per_epoch=10**6,
        batch_size=batch_size,
        accumulation_steps=1,
        lr=1e-5,
        warmup=0.0,
        weight_decay=0.01,
        max_grad_norm=1.0,
        patience=0,
        eval_every=1,
        save_every=0,
        seed=SEED,
    )
    sizes = tuple(len(of_task) for of_task in rows.values())
    return Trainer(
        settings=settings,
        model=model,
        shared=shared,
        of_tasks=of_tasks,
        segment_sizes=[len(shared)],
        train_rows=rows,
        dev_rows={},
        scheduler=RoundRobinScheduler(Setting(tasks, sizes, 1, draws_per_step, every_task=treatment != "sum")),
        treatment=make_treatment(treatment, len(tasks), 1, 0.01),
        precision=precision,
        eval_batch_size=64,
        listener=Silent(),
        regularizers=regularizers,
        embedding=embedding,
    )


def full_trainer(model: MultitaskBert, rows: Mapping[str, Rows], **options: Any) -> Trainer:
    """A trainer of the whole model; options: those of `make_trainer`."""
    embedding = model.sparse_embedding_gradient(options.get("precision", CPU).device.type == "cpu")
    of_tasks = {task: model.task_parameters(task) for task in rows}
    return make_trainer(model, model.shared_parameters(), of_tasks, rows, embedding=embedding, **options)


class Draws:
    """Which rows each step of such a trainer sees, so that a reference can be given the same."""

    def __init__(self, rows: Mapping[str, Rows], draws_per_step: int = 1, batch_size: int = BATCH_SIZE) -> None:
        self.tasks = tuple(rows)
        self.draws_per_step = draws_per_step
        self._streams = {
            task: RowStream(len(of_task), batch_size, derive_seed(SEED, "rows", STAGE, task))
            for task, of_task in rows.items()
        }

    def __call__(self, step: int) -> list[Draw]:
        """The draws of a step, counted from 0."""
        numbers = range(step * self.draws_per_step, (step + 1) * self.draws_per_step)
        return [self._draw(number) for number in numbers]

    def _draw(self, number: int) -> Draw:
        task = self.tasks[number % len(self.tasks)]
        return task, self._streams[task].rows(number // len(self.tasks))


def lengths_of(rows: Mapping[str, TokenizedRows], draws: Sequence[Draw]) -> np.ndarray:
    """(B,) tokens of each row of these draws."""
    return np.concatenate([rows[task].tokens.lengths[numbers] for task, numbers in draws])


def subset(rows: Mapping[str, TokenizedRows], num_rows: int) -> dict[str, TokenizedRows]:
    """About that many rows at random, of each task in proportion; all where there are fewer."""
    total = sum(len(of_task) for of_task in rows.values())
    share = min(1.0, num_rows / total)
    draw = np.random.default_rng(SEED)
    return {
        t: of.select(np.sort(draw.permutation(len(of))[: max(1, round(share * len(of)))])) for t, of in rows.items()
    }


def row_counts(rows: Mapping[str, Rows]) -> dict[str, int]:
    return {task: len(of_task) for task, of_task in rows.items()}
