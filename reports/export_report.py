"""What an export found, to look at: tables, a picture, and the model card of its folder."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_proof import FLOAT, LENGTHS, PROGRAM, score_of
from reports.document import Section, Table, to_text
from reports.finished_run import MEAN, FinishedRun
from reports.model_card import model_card
from run_record import RESULTS

CARD = "model_card.md"
ABOUT = """One encoder with a head for each of the tasks below, as graphs for onnxruntime: token ids in, the answers of
all tasks out. tokenizer.json makes the ids, labels.json says how they fill the inputs and what each output is,
report.json holds what was measured. The scores in the next table are model.onnx's; those of all files stand
below it."""


def show(report: Mapping[str, Any]) -> str:
    """The tables as text."""
    return to_text([export_section(report)])


def export_section(report: Mapping[str, Any]) -> Section:
    """The forms: sizes, scores and how far they lie from the program; milliseconds; one model and several."""
    tasks = [task for task in report[PROGRAM]["dev"] if task != MEAN]
    columns = ["", "MB", *tasks, MEAN, "largest difference", "changed classes", "layers in float"]
    scores = Table(columns, [list(_scores(name, of, (*tasks, MEAN))) for name, of in report.items()])
    timed = {name: of["milliseconds"] for name, of in report.items() if "milliseconds" in of}
    lengths = [n for n in map(str, LENGTHS) if all(n in of for of in timed.values())]
    columns = ["milliseconds of a row of", *(f"{n} tokens{more}" for n in lengths for more in ("", ", p99"))]
    times = [[name, *(f"{of[n][key]:.1f}" for n in lengths for key in ("median", "p99"))] for name, of in timed.items()]
    several = f"{len(tasks)} models"
    sizes = [[name, *_sizes(of, of["separate"])] for name, of in report.items() if name != PROGRAM]
    allowed = ", ".join(f"{name} {of['max_loss']:g}" for name, of in report.items() if "max_loss" in of)
    notes = [f"at most to be lost of a task's score: {allowed}"] if allowed else []
    for of in (of["vocabulary"] for of in report.values() if "vocabulary" in of):
        kept = f"{of['kept']:,} of {of['pieces']:,} word pieces"
        notes.append(f"vocabulary of the training texts: {kept}, and what other words are made of")
    columns_of_sizes = ["MB", "one model", several, "ratio", "memory of one", several, "ratio"]
    tables = [scores, *notes, Table(columns, times), Table(columns_of_sizes, sizes)]
    return Section("Exported files", tables)


def _scores(name: str, form: Mapping[str, Any], tasks: Sequence[str]) -> Iterator[str]:
    """A row of the first table."""
    yield from (name, _millions(form.get("bytes")), *(f"{score_of(form, task):.4f}" for task in tasks))
    largest, task = max((value, task) for task, value in form["largest_difference"].items())
    yield f"{largest:.1e} ({task})" if largest else "0"
    yield str(sum(form["changed_classes"].values()))
    yield ", ".join(form.get("in_float", ())) or "-"


def _sizes(one: Mapping[str, Any], several: Mapping[str, Any]) -> Iterator[str]:
    """A row of the last table."""
    for key in ("bytes", "memory"):
        yield from (_millions(one[key]), _millions(several[key]))
        yield f"{one[key] / several[key]:.2f}" if several[key] else "-"


def _millions(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """The forms' mean scores by their sizes and by their milliseconds, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(xlabel="MB on disk", ylabel="mean dev score")
    right.set(xlabel="milliseconds of a row of 32 tokens, one thread")
    for marker, (name, of) in zip("sovD", report.items(), strict=False):
        milliseconds = of.get("milliseconds", {}).get("32", {}).get("median", np.nan)
        for axis, value in ((left, of.get("bytes", np.nan) / 1e6), (right, milliseconds)):
            axis.plot(value, score_of(of, MEAN), marker, markersize=8, label=name)
    for axis in (left, right):
        axis.grid(color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_xlim(0, axis.get_xlim()[1] * 1.1)
        bottom, top = axis.get_ylim()
        axis.set_ylim(min(bottom, top - 0.05), max(top, bottom + 0.05))  # no magnified thousandths
    right.legend(fontsize=8)
    figure.savefig(path)


def ended(run: Path) -> FinishedRun | None:
    """The run, if it is one that has ended. Raises RunError if it is damaged."""
    return FinishedRun.read(run) if (run / RESULTS).is_file() else None


def write_card(folder: Path, run: FinishedRun, report: Mapping[str, Any]) -> None:
    """The model card."""
    card = model_card(
        run, run.path.resolve().name, ABOUT, [export_section(report)], report[FLOAT]["dev"], report[PROGRAM]
    )
    (folder / CARD).write_text(card, "utf-8")
