"""One thread: the models of the tests are too small to share out, and results must not depend on the machine."""

from pathlib import Path

import pytest
import torch

from helpers import write_checkpoint, write_data

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in Hugging Face's format: 2 layers, 32 wide."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with CS224N's files, a handful of rows each."""
    return write_data(tmp_path_factory.mktemp("data"))
