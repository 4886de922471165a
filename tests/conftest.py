"""One thread: the models of the tests are too small to share out, and results must not depend on the machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import multitask_classifier
from helpers import WORDS, write_checkpoint, write_data
from run import Run

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Runs draw none, which takes longer than all else; test_entry_point.py has those of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "draw_plots", lambda run, results: None)
        yield


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are as wide as without one, also in the processes that share the tests, which are given a width."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in Hugging Face's format: 2 layers, 32 wide."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with CS224N's files, a handful of rows each."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def treated_run(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a short run under PCGrad, made by the command. Not to be changed."""
    out = tmp_path_factory.mktemp("treated") / "run"
    flags = "--pcgrad --scheduler pal --epochs 2 --pretrain_epochs 2 --steps_per_epoch 3 --batch_size 4 --cache off"
    arguments = [*flags.split(), "--device", "cpu", "--model", str(tiny), "--data", str(data), "--out", str(out)]
    assert multitask_classifier.main(arguments) == 0
    return out


@pytest.fixture
def small_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Synonyms without WordNet's files."""
    monkeypatch.setattr("eda.WordNet", lambda folder: lambda word: ("a", "the") if word in WORDS else ())
