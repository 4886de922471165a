"""Tiny random models, batches, checkpoints and data files for the tests, made in milliseconds on the CPU."""

import dataclasses
import functools
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bert import Bert, BertConfig, empty_bert, initialize
from checkpoints import to_huggingface
from datasets import Batch
from model import Layout, MultitaskBert
from ops import DropoutMasks, PackedTokens, TokenStore
from ops.dropout import DropoutBits
from parameters import Choice
from tasks import TASKS, Classes, Score

THREE = ("sst", "para", "sts")  # the program's own tasks, whatever is added to them
ROOT = Path(__file__).resolve().parent.parent
Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
TEXT = "a the film plot song is was not very good bad fine dull bright how do i you learn cook read play fast slow"
WORDS = TEXT.split()
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LINEAR = Choice("linear")
STD = 0.2  # ten times BERT's: differences between the rows of a batch must be well above rounding


class Terminal(io.StringIO):
    """What is shown at a terminal."""

    def isatty(self) -> bool:
        return True


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_config(**overrides: Any) -> BertConfig:
    """2 layers, 32 wide, 4 heads, 100 words."""
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return dataclasses.replace(config, **overrides)


class RecordedMasks(DropoutMasks):
    """Keeps every draw: its probability, and the mask of its elements, flat."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.drawn: list[tuple[float, Tensor]] = []

    def bits(self, numel: int, prob: float) -> DropoutBits:
        bits = super().bits(numel, prob)
        self.drawn.append((prob, (bits.words[:numel] >= bits.threshold).float() * bits.keep))
        return bits


def tiny_encoder(seed: int = 0, **overrides: Any) -> Bert:
    """A random encoder; biases and LayerNorms are random too, so that none of them can be left out unnoticed."""
    encoder = empty_bert(tiny_config(**overrides))
    initialize(encoder, STD, generator(seed))
    randomize_vectors(encoder, seed)
    return encoder


def randomize_vectors(module: torch.nn.Module, seed: int) -> None:
    """Adds noise to every bias and LayerNorm weight."""
    noise = generator(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.1)


def shaken(model: MultitaskBert, seed: int = 40) -> MultitaskBert:
    """The model with every parameter moved, also those that start at zero."""
    noise = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.05)
    return model


@torch.no_grad()
def outputs(model: MultitaskBert, tasks: Sequence[str] = THREE) -> Tensor:
    """Logits of the tasks, one behind the other."""
    batches = {task: random_batch(task, 6, is_split=model.layout.is_split(task)) for task in tasks}
    return torch.cat([model(task, batch).flatten() for task, batch in batches.items()])


def random_tokens(
    num_rows: int, seed: int = 0, config: BertConfig | None = None, is_split: bool = False
) -> PackedTokens:
    """Rows of 2 to 20 tokens, the first part of each of token type 0, the rest of type 1, or a sequence each."""
    config = config or tiny_config()
    random = np.random.default_rng(seed)
    lengths = random.integers(2, min(20, config.max_position_embeddings) + 1, num_rows)
    rows = [random.integers(0, config.vocab_size, length).tolist() for length in lengths]
    types = []
    for length in lengths:
        first = int(random.integers(1, length + (not is_split)))
        types.append([0] * first + [min(1, config.type_vocab_size - 1)] * int(length - first))
    return pack(rows, types, is_split)


def pack(rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]], is_split: bool = False) -> PackedTokens:
    """Rows of token ids and token types as a packed batch. The types of a row are zeros, then ones."""
    firsts = np.array([list(of_row).count(0) for of_row in types])
    store = TokenStore.of(np.concatenate(rows), np.array([len(row) for row in rows]), firsts, "cpu", is_split)
    return store.batch(np.arange(len(rows)))


def random_batch(
    task: str, num_rows: int, seed: int = 0, config: BertConfig | None = None, is_split: bool = False
) -> Batch:
    """Random rows with labels that the task allows."""
    output, random = TASKS[task].output, np.random.default_rng(seed + 1)
    if isinstance(output, Classes):
        labels = random.integers(0, output.num_outputs, num_rows).astype(np.float32)
    elif isinstance(output, Score):
        labels = random.uniform(output.low, output.high, num_rows).astype(np.float32)
    else:
        labels = random.integers(0, 2, num_rows).astype(np.float32)
    return Batch(torch.from_numpy(labels), tokens=random_tokens(num_rows, seed, config, is_split))


def tiny_model(
    tasks: Sequence[str] = THREE,
    adapter: Choice | None = None,
    head: Choice = LINEAR,
    seed: int = 0,
    copied: int = 0,
    pooling: str = "pooler",
    pairs: str = "cross",
    **overrides: Any,
) -> MultitaskBert:
    """A random encoder with random heads and, where wanted, fresh adapters and copied top layers."""
    encoder = tiny_encoder(seed, **overrides)
    layout = Layout(dict.fromkeys(tasks, head), adapter, copied, pooling, pairs)
    model = MultitaskBert(encoder, layout, generator(seed + 2))
    initialize(model.heads, STD, generator(seed + 3))
    return model


def cases(name: str) -> list[str]:
    """The lines of a table in cases/, without blank ones and comments."""
    lines = (ROOT / "tests" / "cases" / name).read_text("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def run_python(*arguments: str) -> str:
    """What a process of its own prints, which has to end well."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    """Processes forked from a server that has imported everything: fresh, and cheap."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_command", "test_search", "sklearn.metrics", "scipy.stats"])
    with pytest.MonkeyPatch.context() as patch:  # the server does not hear of sys.path otherwise
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        forkserver.ensure_running()
    return context


def forked(log: Path, main: Callable[..., int | None], *arguments: Any) -> multiprocessing.context.ForkServerProcess:
    """A process that calls a function of a module; what it prints goes to a file, what it returns is its status."""
    process = server().Process(target=_main_into, args=(str(log), main, *arguments))
    process.start()
    return process


def _main_into(log: str, main: Callable[..., int | None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(main(*arguments))


def run_forked(script: str, **environment: str) -> str:
    """What a script prints in a process of its own that has torch and the program, and has to end well."""
    with tempfile.NamedTemporaryFile() as log:
        process = forked(Path(log.name), _execute, script, environment)
        process.join()
        shown = Path(log.name).read_text("utf-8")
    assert process.exitcode == 0, shown
    return shown


def _execute(script: str, environment: dict[str, str]) -> int:
    os.environ.update(environment)
    exec(script, {})
    return 0


def write_vocabulary(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """A folder with the vocabulary of a tokenizer: BERT's special tokens, then these."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIALS, *words]) + "\n", "utf-8")
    return folder


def write_checkpoint(folder: Path) -> Path:
    """A random checkpoint in Hugging Face's format, 2 layers, 32 wide, that knows `WORDS`."""
    encoder = tiny_encoder(vocab_size=len(SPECIALS) + len(WORDS))
    save_file({f"bert.{n}": t for n, t in to_huggingface(encoder).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(encoder.config.to_dict()))
    return write_vocabulary(folder)


def write_data(folder: Path) -> Path:
    """CS224N's nine files with a handful of rows each; classes of unequal size."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    for name, task in ((name, TASKS[name]) for name in THREE):
        for split, num_rows in (("train", 26), ("dev", 8), ("test", 6)):
            columns = ["", "id", *task.text_columns, *([task.label_column] if split != "test" else [])]
            lines = ["\t".join(columns)]
            for i in range(num_rows):
                texts = [" ".join(draw.choice(WORDS, draw.integers(2, 9))) for _ in task.text_columns]
                label = {"sst": str(min(i % 7, 4)), "para": f"{float(i % 3 == 0)}", "sts": f"{i * 7 % 11 / 2}"}[name]
                lines.append("\t".join([str(i), f"{name}{split}{i}", *texts, *([label] if split != "test" else [])]))
            (folder / task.file_name(split)).write_text("\n".join(lines) + "\n", "utf-8")
    return folder
