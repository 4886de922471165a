"""What all benchmarks share: alternating timings, their statistics, the matmul limit, peak memory, results on paper.

A benchmark is a module with a `BENCHMARK`: `measure` times ours and the reference alternately in one process on the
same rows; `variants` are what is run alone, in a process of its own, where memory is measured.

Shape letters: N packed tokens, B rows, D hidden.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kernels
import numpy as np
import torch
from dense import padded_rows, product, uses_onednn
from torch import Tensor

from bert import EMBEDDED_MODEL, BertConfig, CheckpointError, matmul_flops
from datasets import SAMPLE, DataError
from run_record import RunError, finite, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "numpy", "tokenizers", "transformers", "torchjd")
WARM_UP = 2  # rounds that do not count
MEMORY_STEPS = 8  # steps of a process whose peak memory is read


class OptionError(ValueError):
    """A flag is wrong; the message is one line for the user."""


class MeasurementError(RuntimeError):
    """A process to be measured failed; the message says which and why."""


USER_ERRORS = (OptionError, DataError, CheckpointError, RunError)
Step = Callable[[int], Any]  # takes the number of the round, warm-up included, counted from 0


# --------------------------------------------------------------------------------------------------- statistics


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
        """Quartiles are interpolated linearly between the measurements."""
        lower, median, upper = statistics.quantiles(
            values if len(values) > 1 else [*values, *values], n=4, method="inclusive"
        )
        return cls(median, lower, upper, min(values), max(values), len(values))


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round, how many times the base."""
    return [value / other for value, other in zip(values, base, strict=True)]


def ratio_of_totals(
    values: Sequence[float], sizes: Sequence[float], base: Sequence[float], base_sizes: Sequence[float]
) -> Summary:
    """How many times the base a unit of size takes, all rounds together; the spread is that of resampled rounds.

    For kinds that see different rows, whose rounds cannot be compared one by one.
    """
    draw = np.random.default_rng(0)
    columns = [np.asarray(column, dtype=np.float64) for column in (values, sizes, base, base_sizes)]

    def ratio(rounds: np.ndarray) -> float:
        seconds, size, other_seconds, other_size = (column[rounds].sum() for column in columns)
        return float(seconds / size / (other_seconds / other_size))

    resampled = [ratio(draw.integers(0, len(values), len(values))) for _ in range(1000)]
    spread = Summary.of(resampled)
    whole = ratio(np.arange(len(values)))
    return Summary(whole, spread.lower, spread.upper, spread.smallest, spread.largest, len(values))


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The k of the power law values ~ sizes ** k that fits best in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# ------------------------------------------------------------------------------------------------------ timing


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


def forward_flops(config: BertConfig, lengths: np.ndarray) -> int:
    """Floating-point operations of a forward pass's matrix products, pooler included. lengths: (B,) of the rows."""
    return matmul_flops(config, lengths) + 2 * len(lengths) * config.hidden_size**2


def needed_flops(config: BertConfig, lengths: np.ndarray) -> int:
    """The same without what no pooled output depends on: of the last layer, all but the keys and values of the tokens
    that are not their row's first."""
    size, others = config.hidden_size, int(lengths.sum()) - len(lengths)
    dense = 2 * others * (2 * size * size + 2 * size * config.intermediate_size)
    attention = 4 * size * int((lengths.astype(np.int64) ** 2 - lengths).sum())
    return forward_flops(config, lengths) - dense - attention


def left_out(config: BertConfig, passes: Sequence[np.ndarray], share: float) -> str:
    """A sentence on the products that ours does without. share: of the matmul limit, by all products."""
    part = sum(needed_flops(config, of) for of in passes) / sum(forward_flops(config, of) for of in passes)
    return (
        f"the matmul limit counts all matrix products of the model over real tokens; ours runs {part:.0%} of them (of "
        f"the last layer only what the pooled output depends on), and is at {part * share:.0%} of the limit of those"
    )


def training_flops(config: BertConfig, lengths: np.ndarray) -> int:
    """The same of a forward and a backward pass: each product has one gradient for either factor."""
    return 3 * forward_flops(config, lengths)


class MatmulLimit:
    """The matrix products of an encoder's dense layers, at these shapes, and nothing else.

    What a machine needs for them bounds from below what a pass over the same tokens can take. Each layer has matrices
    of its own, as in the encoder, so that they come from memory as often as there.
    """

    def __init__(
        self,
        config: BertConfig,
        passes: Sequence[np.ndarray],
        training: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """passes: of each pass that will be run the lengths (B,) of its rows. training: the products of the backward
        pass too."""
        self.config, self.training = config, training
        size = config.hidden_size
        shapes = [(3 * size, size), (size, size), (config.intermediate_size, size), (size, config.intermediate_size)]
        shapes = [*shapes * config.num_hidden_layers, (size, size)]
        widest = max(max(shape) for shape in shapes)
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self._weights = [random(*shape) for shape in shapes]
        most = max(self._places(lengths) for lengths in passes)
        self._inputs, self._gradients, self._results = (random(most * widest) for _ in range(3))
        self._weight_gradient = random(max(weight.numel() for weight in self._weights))
        self.run(*{self._places(lengths): lengths for lengths in passes}.values())  # no kernel is made in a timed run

    def run(self, *passes: np.ndarray) -> None:
        """The products of passes over rows of these lengths."""
        *dense, pooler = self._weights
        for lengths in passes:
            for weight in dense:
                self._products(weight, self._places(lengths))
            self._products(pooler, len(lengths))

    def _places(self, lengths: np.ndarray) -> int:
        """Rows of the encoder's matrices: the tokens of these rows, and what the encoder pads them with."""
        num_tokens = int(lengths.sum())
        return num_tokens + padded_rows(self._weights[0][:1].expand(num_tokens, -1))

    def _products(self, weight: Tensor, num_places: int) -> None:
        width_out, width_in = weight.shape
        inputs, result_in = (_leading(of, num_places, width_in) for of in (self._inputs, self._results))
        gradients, result_out = (_leading(of, num_places, width_out) for of in (self._gradients, self._results))
        if uses_onednn(inputs):
            self._onednn_products(inputs, weight, gradients)
            return
        torch.mm(inputs, weight.t(), out=result_out)
        if self.training:
            torch.mm(gradients, weight, out=result_in)
            torch.mm(gradients.t(), inputs, out=_leading(self._weight_gradient, width_out, width_in))

    def _onednn_products(self, inputs: Tensor, weight: Tensor, gradients: Tensor) -> None:
        """The same by the library that the encoder uses. The transposed factor lies in memory as oneDNN reads it."""
        product(inputs, weight)
        if self.training:
            product(gradients, weight.t())
            product(_leading(self._gradients, len(weight), len(inputs)), inputs.t())

    def seconds(self, passes: Sequence[np.ndarray], measured: float) -> float:
        """Seconds of all products of these passes over real tokens, attention's too, at the rate that `run` reached.

        measured: seconds of `run` on these passes.
        """
        *dense, pooler = (weight.numel() for weight in self._weights)
        done = sum(2 * self._places(lengths) * sum(dense) + 2 * len(lengths) * pooler for lengths in passes)
        return measured * sum(forward_flops(self.config, lengths) for lengths in passes) / done


def _leading(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


# ------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Line:
    """One thing that was measured.

    values: of each round, in `unit`. ratio: to what the report's title says. matmul_share: of the speed of the matrix
    products alone. memory: of a process, or of a GPU, that ran nothing else.
    """

    what: str
    values: Sequence[float]
    unit: str = "s"
    ratio: Summary | None = None
    matmul_share: float | None = None
    memory: "Memory | None" = None


@dataclass(frozen=True)
class Memory:
    """Megabytes. peak: the most that was held; before: what was held before the first step."""

    peak_mb: float
    before_mb: float


@dataclass(frozen=True)
class Check:
    """A number that was claimed to be at most this. must_hold: a matter of being right, not of speed."""

    what: str
    found: float
    at_most: float
    must_hold: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Check":
        """What `Report.to_dict` made of a check; what was no number, which JSON cannot hold, is beyond any limit."""
        found = float("inf") if values["found"] is None else values["found"]
        return cls(values["what"], found, values["at_most"], values["must_hold"])

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
        lines = [{**asdict(line), "summary": asdict(Summary.of(line.values))} for line in self.lines]
        checks = [{**asdict(check), "holds": check.holds} for check in self.checks]
        values = {"title": self.title, "lines": lines, "checks": checks, "notes": list(self.notes)}
        return dict(finite({**values, "settings": dict(self.settings)}))


def significant(value: float) -> str:
    """Three significant digits, or all digits before the point."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{digits}f}" if digits <= 5 else f"{value:.1e}"


def spread(summary: Mapping[str, float], scale: float = 1.0) -> str:
    """Median and quartiles: "2.31 (2.25 to 2.40)"."""
    median, lower, upper = (significant(scale * summary[key]) for key in ("median", "lower", "upper"))
    return f"{median} ({lower} to {upper})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        shown = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(shown)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


HEADER = ("median (quartiles)", "ratio (quartiles)", "share of matmul limit", "peak memory (before first step)")


def cells(line: Mapping[str, Any]) -> list[str]:
    """The cells of a line's table row behind its name. line: as `Report.to_dict` holds it."""
    summary, ratio, unit = line["summary"], line["ratio"], line["unit"]
    scale, unit = (1000, "ms") if unit == "s" and summary["median"] < 1 else (1, unit)
    measured = f"{spread(summary, scale)} {unit}"
    compared = spread(ratio) if ratio else ""
    share = f"{line['matmul_share']:.0%}" if line["matmul_share"] is not None else ""
    memory = "{peak_mb:.0f} MB ({before_mb:.0f})".format(**line["memory"]) if line["memory"] else ""
    return [measured, compared, share, memory]


def shown(report: Mapping[str, Any]) -> str:
    """A report as text. report: as `Report.to_dict` holds it."""
    rows = [[line["what"], *cells(line)] for line in report["lines"]]
    used = [i for i in range(len(HEADER) + 1) if any(row[i] for row in rows)]
    body = table([("", *HEADER)[i] for i in used], [[row[i] for i in used] for row in rows])
    checks = [str(Check.from_dict(check)) for check in report["checks"]]
    return "\n".join([report["title"], "", body, "", *checks, *report["notes"]]).rstrip()


# ------------------------------------------------------------------------------------------------- where it ran


def device_name(device: torch.device | str = "cpu") -> str:
    """The processor and its number of usable cores, or the GPU; no host's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = num_cores()
    return f"{_processor()}, {cores} core{'s' * (cores > 1)}"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM|r|tm)\)|CPU", "", name).split())


def file_name(device: str) -> str:
    """The name of a device's result file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The device, its load before the measurement, and versions."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "kernels": kernels.record(torch.device(device).type),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def publish(name: str, report: Report, found: Mapping[str, Any], out: Path | None) -> int:
    """Prints a report and, where there is a folder, puts it into the device's result file; returns the exit status.

    found: the environment. Other benchmarks' results in the file stay.
    """
    values = report.to_dict()
    print(f"{name}: {shown(values)}\n", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / file_name(found["device"])
        before = read_json(path) if path.is_file() else {}
        results = {**before.get("benchmarks", {}), name: {"environment": dict(found), **values}}
        write_json(path, {"device": found["device"], "benchmarks": results})
    return int(any(check.must_hold and not check.holds for check in report.checks))


# ------------------------------------------------------------------------------------------------------- command


@dataclass(frozen=True)
class Options:
    """What every benchmark can be told. rounds: that count; out: folder of the result file, None for none."""

    data: Path = SAMPLE
    model: str = EMBEDDED_MODEL
    rounds: int = 15
    threads: int = 0
    quick: bool = False
    out: Path | None = RESULTS

    def arguments(self) -> list[str]:
        """The command line that gives these options."""
        given = ["--data", str(self.data), "--model", self.model, "--rounds", str(self.rounds)]
        given += ["--threads", str(self.threads)]
        given += ["--quick"] if self.quick else []
        return given + (["--out", str(self.out)] if self.out is not None else [])


@dataclass(frozen=True)
class Benchmark:
    """One script. variants: by name, what is run alone to see its peak memory; made when called, so that nothing else
    is in the process."""

    name: str
    measure: Callable[[Options], Report]
    variants: Callable[[Options], Mapping[str, Callable[[], Step]]] = lambda options: {}
    rounds: int = 15

    def memory(self, variant: str, options: Options) -> Memory:
        """Of a process that imports the program, loads the rows and takes a few steps of one variant."""
        command = [sys.executable, "-m", f"benchmarks.{self.name}", *options.arguments(), "--alone", variant]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MeasurementError(f"{self.name} --alone {variant!r}: {done.stderr.strip()}")
        return Memory(**json.loads(done.stdout.splitlines()[-1]))


def resident_memory_mb(peak: bool) -> float:
    """Resident memory of this process: the most that it held, or what it holds now.

    Linux's getrusage, which knows the peak only, begins with the memory of the process that started this one; the
    /proc entry does not.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    found = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB$", status, re.MULTILINE)
    if found:
        return int(found[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def add_flags(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The flags of `Options`."""
    parser.add_argument("--data", type=Path, default=SAMPLE, help="directory with CS224N's files (default: the sample)")
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="checkpoint of the encoder (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=0, help=f"rounds that count (default {rounds}; with --quick 2)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: to see that it works")
    parser.add_argument(
        "--out", type=Path, help="folder of the result file (default benchmarks/results; --quick: none)"
    )


def options_of(given: argparse.Namespace, rounds: int) -> Options:
    """The options of a parsed command line. Raises OptionError for numbers out of range."""
    for name, least in (("rounds", 0), ("threads", 0)):
        if getattr(given, name) < least:
            raise OptionError(f"--{name} {getattr(given, name)}: expected {least} or more")
    out = given.out or (None if given.quick else RESULTS)
    count = given.rounds or (2 if given.quick else rounds)
    return Options(given.data.resolve(), given.model, count, given.threads, given.quick, out and out.resolve())


def run(benchmark: Benchmark, description: str, arguments: Sequence[str] | None = None) -> int:
    """The command of a benchmark. Returns its exit status.

    0; 1 for a failure, or for a check that must hold and does not; 2 for bad input.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark.name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, benchmark.rounds)
    parser.add_argument("--alone", metavar="VARIANT", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        options = options_of(given, benchmark.rounds)
        if options.threads:
            torch.set_num_threads(options.threads)
        if given.alone:
            print(json.dumps(asdict(_run_alone(benchmark, given.alone, options))))
            return 0
        found = environment()
        return publish(benchmark.name, benchmark.measure(options), found, options.out)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MeasurementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run_alone(benchmark: Benchmark, variant: str, options: Options) -> Memory:
    variants = benchmark.variants(options)
    if variant not in variants:
        raise OptionError(f"--alone {variant}: expected one of {', '.join(variants)}")
    take_step = variants[variant]()
    before = resident_memory_mb(peak=False)
    for number in range(2 if options.quick else MEMORY_STEPS):
        take_step(number)
    return Memory(resident_memory_mb(peak=True), before)
