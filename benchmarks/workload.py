"""What the benchmarks run: the rows, ours as the program runs it, and which rows each step sees."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bert import BertConfig
from checkpoints import find_checkpoint, load_model, read_bert_config
from datasets import Rows, RowStream, TokenizedRows, Tokenizer, TokenRows, data_folder, read_examples, tasks_in
from engine import Methods, Stage, StageData, Trainer, rows_of_plan
from evaluation import Precision
from model import Layout, MultitaskBert, TaskModel, Trained
from parameters import Choice, NoParameters
from pcgrad import find_treatment
from schedulers import RoundRobinScheduler, Setting
from seeding import derive_seed
from smart import Regularizer
from tasks import TASKS
from token_cache import tokenize_file

BATCH_SIZE = 32
SEED = 0
FIRST_WORD = 1000  # the ids below are special tokens
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
        return cls(folder, read_bert_config(folder))

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder, self.config.num_positions)

    def rows(self, data: Path, split: str) -> dict[str, TokenizedRows]:
        """The rows of a split of all tasks. Raises DataError for a file that cannot be used."""
        folder, tokenizer = data_folder(str(data)), self.tokenizer()
        tasks = [TASKS[name] for name in tasks_in(str(data))]
        files = {task: read_examples(folder / task.file_name(split), task, labelled=True) for task in tasks}
        device = torch.device("cpu")
        return {task.name: tokenize_file(file, task, tokenizer, device).rows for task, file in files.items()}

    def model(self, tasks: Sequence[str], adapter: Choice | None = None) -> MultitaskBert:
        """The encoder with new heads, the same every time."""
        layout = Layout(dict.fromkeys(tasks, Choice("linear")), adapter)
        return load_model(self.folder, layout, torch.Generator().manual_seed(SEED)).model


def make_trainer(
    model: TaskModel,
    trained: Trained,
    rows: Mapping[str, Rows],
    draws_per_step: int = 1,
    treatment: str = "",
    regularizers: Sequence[Regularizer] = (),
    precision: Precision = CPU,
    batch_size: int = BATCH_SIZE,
    rows_per_step: int = 0,
    cuda_graphs: bool = False,
) -> Trainer:
    """A trainer that draws the tasks in turn, `draws_per_step` of them in a step of batch_size rows for each draw, or
    of rows_per_step rows in all."""
    tasks = tuple(rows)
    stage = Stage(
        name=STAGE,
        tasks=tasks,
        epochs=1,
        steps_per_epoch=10**6,
        batch_size=rows_per_step or batch_size * draws_per_step,
        accumulation_steps=1,
        lr=1e-5,
        warmup=0.0,
        weight_decay=0.01,
        max_grad_norm=1.0,
        patience=0,
        eval_every=1,
        eval_batch_size=64,
        seed=SEED,
    )
    sizes = tuple(len(of_task) for of_task in rows.values())
    setting = Setting(tasks, sizes, 1, draws_per_step, every_task=bool(treatment))
    scheduler = RoundRobinScheduler(NoParameters(), setting)
    method = find_treatment(treatment)(NoParameters(), len(tasks), 1) if treatment else None
    methods = Methods(scheduler, method, regularizers)
    return Trainer(stage, model, trained, StageData(rows, {}), methods, precision, cuda_graphs)


def full_trainer(model: MultitaskBert, rows: Mapping[str, Rows], **options: Any) -> Trainer:
    """A trainer of the whole model; options: those of `make_trainer`."""
    return make_trainer(model, model.trained(), rows, **options)


def steps_of(trainer: Trainer, count: int) -> Callable[[int], Any]:
    """That many steps at a time, as a run takes them: on a GPU the host does not wait for each."""
    events = trainer.run()
    return lambda number: [next(events) for _ in range(count)]


def step_of(trainer: Trainer) -> Callable[[int], Any]:
    """Its steps by their numbers."""
    return lambda number: trainer.take_step(1, number)


class Draws:
    """Which rows each step of such a trainer sees, so that a reference can be given the same."""

    def __init__(
        self, rows: Mapping[str, Rows], draws_per_step: int = 1, batch_size: int = BATCH_SIZE, rows_per_step: int = 0
    ) -> None:
        self.tasks = tuple(rows)
        self._streams = {
            task: RowStream(len(of_task), derive_seed(SEED, STAGE, "rows", task)) for task, of_task in rows.items()
        }
        self._drawn = dict.fromkeys(rows, 0)
        self._rows_per_step, self._steps = rows_per_step or batch_size * draws_per_step, list[list[Draw]]()
        sizes = tuple(map(len, rows.values()))
        self._scheduler = RoundRobinScheduler(NoParameters(), Setting(self.tasks, sizes, 1, draws_per_step))

    def __call__(self, step: int) -> list[Draw]:
        """The draws of a step, counted from 0: each task's rows."""
        while len(self._steps) <= step:
            plan = self._scheduler.plan(1, len(self._steps), random.Random())
            counts = rows_of_plan({task: plan[task] for task in self.tasks if task in plan}, self._rows_per_step)
            self._steps.append([(task, self._next(task, count)) for task, count in counts.items()])
        return self._steps[step]

    def _next(self, task: str, count: int) -> np.ndarray:
        self._drawn[task] += count
        return self._streams[task].rows(self._drawn[task] - count, count)


def lengths_of(rows: Mapping[str, TokenizedRows], draws: Sequence[Draw]) -> np.ndarray:
    """(B,) tokens of each row of these draws."""
    return np.concatenate([rows[task].tokens.lengths[numbers] for task, numbers in draws])


def batch_lengths(rows: TokenizedRows, batch_size: int) -> list[np.ndarray]:
    """(B,) tokens of the rows of each batch of our predictions."""
    ordered = rows.tokens.lengths[rows.by_length()]
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def subset(rows: Mapping[str, TokenizedRows], num_rows: int) -> dict[str, TokenizedRows]:
    """About that many rows at random, of each task in proportion; all where there are fewer."""
    share = min(1.0, num_rows / sum(map(len, rows.values())))
    draw = np.random.default_rng(SEED)
    return {
        t: of.select(np.sort(draw.permutation(len(of))[: max(1, round(share * len(of)))])) for t, of in rows.items()
    }


def random_rows(
    lengths: Mapping[str, np.ndarray], num_rows: int, config: BertConfig, device: torch.device = CPU.device
) -> dict[str, TokenizedRows]:
    """Rows of random words, whose lengths are drawn from these; labels that the task allows."""
    draw = np.random.default_rng(SEED)
    rows = {}
    for name, of_task in lengths.items():
        drawn = np.minimum(draw.choice(of_task, num_rows), config.num_positions).astype(np.int32)
        first_word = min(FIRST_WORD, config.vocab_size - 1)
        ids = draw.integers(first_word, config.vocab_size, int(drawn.sum()), dtype=np.int32)
        firsts = drawn if len(TASKS[name].text_columns) == 1 else np.maximum(drawn // 2, 1)
        labels = draw.integers(0, TASKS[name].output.num_classes or 6, num_rows).astype(np.float32)
        names = [str(i) for i in range(num_rows)]
        rows[name] = TokenizedRows(TASKS[name], names, labels, TokenRows(ids, drawn, firsts), device)
    return rows


def row_counts(rows: Mapping[str, Rows]) -> dict[str, int]:
    return {task: len(of_task) for task, of_task in rows.items()}
