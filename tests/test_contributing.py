"""CONTRIBUTING.md: what it adds to each table, applied to a copy of the program as it is written there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from tasks import TASKS

OF_ENTRIES = ("config", "extension", "heads", "layering", "model", "pal", "pcgrad", "schedulers", "smart", "tasks")
FLAGS = "--scheduler inverse --evened --evened_rate 0.9 --small --head scaled --scaled_factor 3 --bias --epochs 1"
FLAGS += " --pretrain_epochs 2 --steps_per_epoch 3 --batch_size 8 --cache off --device cpu"


def apply(diff: str, path: Path) -> None:
    """Hunks, separated by empty lines, of which each must fit one place of the file."""
    content = path.read_text("utf-8")
    for hunk in diff.rstrip("\n").split("\n\n"):
        lines = hunk.split("\n")
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        assert content.count(old) == 1, (path.name, old)
        content = content.replace(old, new)
    path.write_text(content, "utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with an entry more in each of its tables."""
    folder = tmp_path_factory.mktemp("extended") / "program"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "docs", "results"))
    pattern = re.compile(r"^\*\*[\w ]+\*\* \(`(\w+\.py)`\).*?```diff\n(.*?)```", re.DOTALL | re.MULTILINE)
    found = pattern.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    files = ["tasks.py", "schedulers.py", "pcgrad.py", "smart.py", "heads.py", "pal.py"]
    assert [name for name, _ in found] == files
    for name, diff in found:
        apply(diff, folder / name)
    return folder


def test_all_train_together(extended: Path, tiny: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    for split in ("train", "dev", "test"):
        like = TASKS["para"]
        content = (data / like.file_name(split)).read_text().replace(like.label_column, "relation")
        (tmp_path / "data" / f"mnli-{'test-student' if split == 'test' else split}.csv").write_text(content)
    places = ["--model", tiny, "--data", tmp_path / "data", "--out", tmp_path / "run"]
    subprocess.run([sys.executable, extended / "multitask_classifier.py", *places, *FLAGS.split()], check=True)
    dev = json.loads((tmp_path / "run" / "results.json").read_text())["dev"]
    assert set(dev) == {"sst", "para", "sts", "mnli", "mean"}


def test_the_other_tests_hold_with_them(extended: Path) -> None:
    tests = [f"tests/test_{name}.py" for name in OF_ENTRIES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=extended, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


def test_they_are_written_as_the_program_is(extended: Path) -> None:
    for what in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *what, "--no-cache", extended], check=True)
