"""What all benchmarks share: alternating timings, their statistics, peak memory, result files, common flags."""

import argparse
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from bert import CheckpointError
from checkpoints import EMBEDDED_MODEL
from datasets import SAMPLE, DataError
from ops import speed_report
from run_record import RunError, finite, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "numpy", "tokenizers", "transformers")
WARM_UP = 2  # rounds that do not count


class MeasurementError(RuntimeError):
    """A process to be measured failed; the message says which and why."""


ERRORS = (MeasurementError, DataError, CheckpointError, RunError)  # each a line for the user
Step = Callable[[int], Any]  # takes the number of the round, warm-up included, counted from 0


@dataclass(frozen=True)
class Summary:
    """Median, quartiles and extremes of repeated measurements."""

    median: float
    lower: float
    upper: float
    smallest: float
    largest: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        smallest, lower, median, upper, largest = np.percentile(values, [0, 25, 50, 75, 100]).tolist()
        return cls(median, lower, upper, smallest, largest, len(values))

    @classmethod
    def of_ratios(cls, values: Sequence[float], base: Sequence[float]) -> "Summary":
        """Round by round, how many times the base."""
        return cls.of([value / other for value, other in zip(values, base, strict=True)])


def ratio_of_totals(values: Sequence[float], base: Sequence[float]) -> Summary:
    """How many times the base, all rounds together; the spread is that of resampled rounds.

    For kinds that see different rows, whose rounds cannot be compared one by one.
    """
    columns = np.array([values, base])  # (2, rounds)
    resampled = columns[:, np.random.default_rng(0).integers(0, len(values), (1000, len(values)))].sum(2)  # (2, 1000)
    spread = Summary.of((resampled[0] / resampled[1]).tolist())
    return replace(spread, median=sum(values) / sum(base), count=len(values))


def alternate(
    kinds: Mapping[str, Step], rounds: int, warm_up: int = WARM_UP, synchronize: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each kind in each round; every round runs all kinds, one after the other.

    Each round begins with another kind: the first to see a batch may pay for what the library makes for its shape.
    synchronize: waits for a device that works asynchronously.
    """
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    names = list(kinds)
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            synchronize()
            started = time.perf_counter()
            kinds[name](number)
            synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@dataclass(frozen=True)
class Memory:
    """Megabytes. peak: the most that was held; before: what was held before the first step."""

    peak_mb: float
    before_mb: float


@dataclass(frozen=True)
class Line:
    """One thing that was measured.

    values: of each round, in `unit`. ratio: to what the report's title says. matmul_share: of the speed of the matrix
    products alone. memory: of a process that ran nothing else, or of the GPU.
    """

    what: str
    values: Sequence[float]
    unit: str = "s"
    ratio: Summary | None = None
    matmul_share: float | None = None
    memory: Memory | None = None

    def cells(self) -> list[str]:
        """Its row of `TABLE_HEADER`."""
        summary = Summary.of(self.values)
        scale, unit = (1000, "ms") if self.unit == "s" and summary.median < 1 else (1, self.unit)
        return [
            self.what,
            f"{spread(summary, scale)} {unit}",
            spread(self.ratio) if self.ratio else "",
            f"{self.matmul_share:.0%}" if self.matmul_share is not None else "",
            f"{self.memory.peak_mb:.0f} MB ({self.memory.before_mb:.0f})" if self.memory else "",
        ]


TABLE_HEADER = ("", "median (quartiles)", "ratio (quartiles)", "share of matmul limit", "peak memory (before step 1)")


def lines_of(
    seconds: Mapping[str, Sequence[float]],
    base: str,
    memory: Mapping[str, Memory] = MappingProxyType({}),
    ratios: Mapping[str, Summary] = MappingProxyType({}),
) -> list[Line]:
    """A line for each kind, with its ratio to one of them, round by round where `ratios` does not say otherwise."""
    over = {name: Summary.of_ratios(of, seconds[base]) for name, of in seconds.items() if name != base} | dict(ratios)
    return [Line(name, of, "s", over.get(name), memory=memory.get(name)) for name, of in seconds.items()]


@dataclass(frozen=True)
class Check:
    """A number that was claimed to be at most this. must_hold: a matter of being right, not of speed."""

    what: str
    found: float
    at_most: float
    must_hold: bool = False

    @property
    def holds(self) -> bool:
        return self.found <= self.at_most

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        return f"{self.what}: {significant(self.found)}, at most {significant(self.at_most)}: {verdict}"


@dataclass(frozen=True)
class Report:
    """What a benchmark found. title: what was compared, and what the ratios are to."""

    title: str
    lines: Sequence[Line]
    checks: Sequence[Check] = ()
    notes: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As a result file holds it."""
        lines = [{**asdict(line), "summary": asdict(Summary.of(line.values))} for line in self.lines]
        checks = [{**asdict(check), "holds": check.holds} for check in self.checks]
        values = {"title": self.title, "lines": lines, "checks": checks, "notes": list(self.notes)}
        return dict(finite({**values, "settings": dict(self.settings)}))

    def __str__(self) -> str:
        from tabulate import tabulate

        columns = zip(TABLE_HEADER, *(line.cells() for line in self.lines), strict=True)
        header, *rows = zip(*(column for column in columns if any(column[1:])), strict=True)
        align = ["left", *["right"] * (len(header) - 1)]
        table = tabulate(rows, header, tablefmt="pipe", colalign=align, disable_numparse=True)
        return "\n".join([self.title, "", table, "", *map(str, self.checks), *self.notes]).rstrip()


def significant(value: float) -> str:
    """Three significant digits, or all digits before the point."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")


def spread(summary: Summary, scale: float = 1.0) -> str:
    """Median and quartiles: "2.31 (2.25 to 2.40)"."""
    median, lower, upper = (significant(scale * of) for of in (summary.median, summary.lower, summary.upper))
    return f"{median} ({lower} to {upper})"


def publish(name: str, report: Report, environment: Mapping[str, Any], out: Path | None) -> int:
    """Prints a report and, where there is a folder, puts it into the device's result file; returns the exit status.

    Other benchmarks' results in the file stay.
    """
    print(f"{name}: {report}\n", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / file_name(environment["device"])
        before = read_json(path)["benchmarks"] if path.is_file() else {}
        results = {**before, name: {"environment": dict(environment), **report.to_dict()}}
        write_json(path, {"device": environment["device"], "benchmarks": results})
    return int(any(check.must_hold and not check.holds for check in report.checks))


def device_name(device: torch.device) -> str:
    """The processor and its number of usable cores, or the GPU; no host's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    processor = found[1] if found else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{' '.join(re.sub(r'[(](R|TM|r|tm)[)]|CPU', '', processor).split())}, {cores} core{'s' * (cores > 1)}"


def file_name(device: str) -> str:
    """The name of a device's result file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def environment_of(device: torch.device) -> dict[str, Any]:
    """The device, the load before the measurement, and versions."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "kernels": speed_report(device.type),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES if find_spec(p)}},
    }


@dataclass(frozen=True)
class Options:
    """What every benchmark can be told. rounds: that count; out: folder of the result file, None for none."""

    data: Path = SAMPLE
    model: str = EMBEDDED_MODEL
    rounds: int = 0
    threads: int = 0
    out: Path | None = None


def count(text: str) -> int:
    """For argparse: a whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 0 or more")
    return int(text)


def make_parser(name: str, description: str | None, rounds: int | str) -> argparse.ArgumentParser:
    """rounds: that count where the command line does not say, which is 0 then."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description, formatter_class=layout)
    parser.add_argument("--data", type=Path, default=SAMPLE, help="directory with CS224N's files (default: the sample)")
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="checkpoint of the encoder (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=0, help=f"rounds that count (default: {rounds})")
    return parser
