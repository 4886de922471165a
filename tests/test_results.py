"""The figures of docs/results.md are those of the runs beside it."""

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from scipy.stats import ttest_rel

from config import make_parser
from helpers import ROOT
from run_record import CHECKSUM, settings_checksum

DOCS = ROOT / "docs"
SCORES = {"sst": "accuracy", "para": "accuracy", "sts": "pearson"}
ROW = re.compile(r"\| (?!run )([\w.-]+) \| ([^|]*) \| ([^|]*(?: \| [^|]*){3}) \| ([^|]*) \|")
ROWS = [row.groups() for row in map(ROW.fullmatch, (DOCS / "results.md").read_text("utf-8").splitlines()) if row]


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text("utf-8"))


def runs_of(name: str) -> list[Path]:
    """A line's runs; of `separate` one a task."""
    pattern = f"{name}-*-seed?" if name == "separate" else f"{name}-seed?"
    return sorted((DOCS / "results").glob(pattern))


def scores(name: str) -> dict[int, list[float]]:
    """Of each seed the scores of the three tasks, of one model or of several, and their mean."""
    found: dict[int, dict[str, float]] = {}
    for run in runs_of(name):
        config, dev = read(run, "config.json"), read(run, "results.json")["dev"]
        alone = f"-{config['tasks'][0]}" if name == "separate" else ""
        assert config["tasks"] == (config["tasks"][:1] if alone else [*SCORES])
        assert config["name"] == name + alone and f"{name}{alone}-seed{config['seed']}" == run.name
        assert config[CHECKSUM] == settings_checksum(config)
        own = {task: dev[task][SCORES[task]] for task in config["tasks"]}
        assert dev["mean"] == pytest.approx(mean(own.values()))
        of_seed = found.setdefault(config["seed"], {})
        assert not own.keys() & of_seed.keys()
        of_seed |= own
    return {seed: [*(of[task] for task in SCORES), mean(of.values())] for seed, of in found.items()}


def test_every_run_has_its_line() -> None:
    runs = {folder.name.rpartition("-seed")[0] for folder in (DOCS / "results").iterdir()}
    of_three = {"separate": [f"separate-{task}" for task in SCORES]}  # in one line
    assert sorted(run for name, *_ in ROWS for run in of_three.get(name, [name])) == sorted(runs)


@pytest.mark.parametrize(("name", "setting"), [row[:2] for row in ROWS], ids=[name for name, *_ in ROWS])
def test_the_flags_of_a_line_are_those_of_its_runs(name: str, setting: str) -> None:
    words = [word for flags in re.findall(r"`(--[^`]*)`", setting) for word in flags.split()]
    said = vars(make_parser().parse_args(words))
    for config in (read(run, "config.json") for run in runs_of(name)):
        assert {flag: config[flag] for flag in said} == said


@pytest.mark.parametrize(("name", "_", "cells", "to_pal"), ROWS, ids=[name for name, *_ in ROWS])
def test_a_line_is_the_mean_and_deviation_of_its_runs(name: str, _: str, cells: str, to_pal: str) -> None:
    own, pal = scores(name), scores("pal")
    for cell, column in zip(cells.split(" | "), zip(*own.values(), strict=True), strict=True):
        shown, _, deviation = cell.partition(" ±")
        assert float(shown) == pytest.approx(mean(column), abs=0.00051)
        if len(own) > 1:
            assert float(deviation) == pytest.approx(stdev(column), abs=0.00051)
    if to_pal:
        difference, p = re.fullmatch(r"([-+]?\.\d{3}) \((\.\d{3})\)", to_pal).groups()
        assert own.keys() == pal.keys() and len(own) > 1
        pairs = [(own[seed][-1], pal[seed][-1]) for seed in own]
        assert float(difference) == pytest.approx(mean(a - b for a, b in pairs), abs=0.00051)
        assert float(p) == pytest.approx(ttest_rel(*zip(*pairs, strict=True)).pvalue, abs=0.00051)
