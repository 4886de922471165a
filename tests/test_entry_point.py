"""The installed command, and what completes its flags."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config import Config, FlagError, parse
from helpers import ROOT, Capture, cases
from parameters import flags_of


def test_the_installed_command_does_what_the_script_does(tiny: Path, tmp_path: Path) -> None:
    """From a wheel in a folder of its own, in a directory without the program."""
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "tests", "docs", "runs", "build"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", tmp_path / "installed", tmp_path / "source"], check=True)
    shutil.rmtree(tmp_path / "source")
    assert {path.name.split("-")[0] for path in (tmp_path / "installed").iterdir()} == {"multitask_bert", "bin"}
    flags = f"--model {tiny} --tasks sts --pretrain_epochs 1 --epochs 1 --steps_per_epoch 1 --device cpu --out run"
    done = subprocess.run(
        [sys.executable, tmp_path / "installed" / "bin" / "multitask-bert", *flags.split()],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "training" in done.stdout, done.stderr
    names = {"dev-scores.png", "training-loss.png", "learning-rate.png", "similarity-sts.png"}
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} == names


def test_every_flag_and_choice_is_completed(capsys: Capture) -> None:
    for shell in ("bash", "zsh"):
        with pytest.raises(SystemExit):
            parse(["--print_completion", shell])
        shown = capsys.readouterr().out
        flags = [f"--no-{name}" if flag.default is True else f"--{name}" for name, flag in flags_of(Config)]
        assert [flag for flag in flags if flag not in shown] == [] and "multitask-bert" in shown
        assert all(word in shown for word in ("individual_pretrain", "round_robin", "siamese", "bf16", "sts"))
    with pytest.raises(FlagError, match=r"--print_completion ksh: expected one of .*bash"):
        parse(["--print_completion", "ksh"])


def test_every_module_is_installed() -> None:
    """The packages of pyproject.toml hold all modules that the command can reach."""
    text = (ROOT / "pyproject.toml").read_text()
    names = {line.split(":")[0].split(".")[0] for line in cases("imports.txt") if "." in line.split(":")[0]}
    assert names and all(f'"multitask_bert.{name}"' in text for name in names)
