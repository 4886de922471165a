"""The figures of docs/results.md are those of the runs beside it."""

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from helpers import ROOT
from run_record import CHECKSUM, settings_checksum

DOCS = ROOT / "docs"
SCORES = (("sst", "accuracy"), ("para", "accuracy"), ("sts", "pearson"))
ROW = re.compile(r"\| (?!run )([\w.-]+) \| [^|]* \| ([^|]*(?: \| [^|]*){3}) \| ([^|]*) \|")
ROWS = [row.groups() for row in map(ROW.fullmatch, (DOCS / "results.md").read_text("utf-8").splitlines()) if row]


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text("utf-8"))


def test_every_run_has_its_line() -> None:
    runs = {folder.name.rpartition("-seed")[0] for folder in (DOCS / "results").iterdir()}
    assert sorted(name for name, *_ in ROWS) == sorted(runs)


@pytest.mark.parametrize(("name", "cells", "_"), ROWS, ids=[name for name, *_ in ROWS])
def test_a_line_is_the_mean_and_deviation_of_its_runs(name: str, cells: str, _: str) -> None:
    runs = sorted((DOCS / "results").glob(f"{name}-seed?"))
    scores = []
    for run in runs:
        config, dev = read(run, "config.json"), read(run, "results.json")["dev"]
        assert config["name"] == name and f"{name}-seed{config['seed']}" == run.name
        assert config[CHECKSUM] == settings_checksum(config)
        scores.append([*(dev[task][metric] for task, metric in SCORES), dev["mean"]])
    for cell, column in zip(cells.split(" | "), zip(*scores, strict=True), strict=True):
        shown, _, deviation = cell.partition(" ±")
        assert float(shown) == pytest.approx(mean(column), abs=0.00051)
        if len(runs) > 1:
            assert float(deviation) == pytest.approx(stdev(column), abs=0.00051)
