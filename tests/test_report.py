"""The command on one run and on several: what it prints, writes and refuses, and that it does not wait for torch."""

import csv
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import multitask_classifier
from helpers import ROOT, THREE, Capture, Patch, run_python
from made_runs import labels_of, noisy, training_records, write_dev_files, write_run
from reports.comparison import settings_of, titles
from reports.finished_run import FinishedRun
from reports.plots import draw_comparison
from reports.report import main
from tasks import TASKS

NUM_PLOTS = 6


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_dev_files(tmp_path / "data", 120)


def made(files: Path, name: str, /, noise: float = 0.3, **flags: Any) -> Path:
    predictions = {task: noisy(files, task, noise, flags.get("seed", 0)) for task in THREE}
    return write_run(files.parent / name, files, predictions, training_records(is_treated=True), **flags)


def run(capsys: Capture, *arguments: Any, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    shown = capsys.readouterr()
    return shown.out, shown.err


def sections_of(text: str) -> dict[str, str]:
    parts = re.split(r"^(.+)\n=+\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_one_run_has_its_plots_scores_errors_and_paths(treated_run: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = shutil.copytree(treated_run, tmp_path / "copy", ignore=shutil.ignore_patterns("last"))
    out, err = run(capsys, copy, "--format", "svg")
    assert err == "" and [path.suffix for path in (copy / "plots").iterdir()] == [".svg"] * NUM_PLOTS
    found = sections_of(out)
    results = json.loads((copy / "results.json").read_text())
    scores = found[f"Run {copy}"]
    for task in THREE:
        for name, value in results["dev"][task].items():
            assert re.search(rf"{re.escape(TASKS[task].title)} +8  {name} +{re.escape(f'{value:.3f}')}", scores)
    assert len(re.findall(r"-?\d\.\d{3} to -?\d\.\d{3}", scores)) == 4  # each task and the mean
    gradients = found["Task gradients under pcgrad"]
    assert f"{results['gradients']['finetune']['cosine']['sst-sts']:.3f}" in gradients
    assert {f"{task.title}: errors" for task in (TASKS[name] for name in THREE)} <= set(found)
    for path in (*(copy / "plots").iterdir(), copy / "results.json", copy / "predictions", copy / "best"):
        assert str(path) in found["Files"]


@pytest.fixture
def no_plots(monkeypatch: Patch) -> None:
    """The report draws nothing, which takes longer than all else."""
    monkeypatch.setattr("reports.report.run_plots", lambda run: [])


@pytest.mark.usefixtures("no_plots")
def test_the_metric_that_counts_has_its_interval_and_guess_wherever_it_stands(
    files: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    output: Any = TASKS["sst"].output
    monkeypatch.setitem(TASKS, "sst", replace(TASKS["sst"], output=replace(output, selection_metric="macro_f1")))
    shown, _ = run(capsys, made(files, "run"))
    metrics = re.findall(r"(\w+) +-?\d\.\d{3}  +\d\.\d{3} to \d\.\d{3} +\d\.\d{3}$", shown, re.MULTILINE)
    assert metrics == ["macro_f1", "accuracy", "pearson", "mean"]


@pytest.mark.usefixtures("no_plots")
def test_errors_are_shown_with_file_line_and_text(files: Path, capsys: Capture) -> None:
    found = sections_of(run(capsys, made(files, "run"))[0])
    text = (files / "quora-dev.csv").read_text().splitlines()
    rows = re.findall(r"quora-dev\.csv:(\d+) +(no|yes) +(no|yes) +(0\.\d+)  (\S+)", found["Quora paraphrase: errors"])
    assert len(rows) == 5
    for line, label, prediction, _, first_word in rows:
        cells = text[int(line) - 1].split("\t")
        assert ["no", "yes"][int(cells[-1])] == label != prediction and cells[2].split()[0] == first_word
    assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)
    assert "Largest errors:" in found["STS similarity: errors"]
    assert "words" in found["SST-5 sentiment: errors"] and "class" in found["SST-5 sentiment: errors"]


@pytest.mark.usefixtures("no_plots")
def test_changed_data_are_said_and_errors_by_text_left_out(files: Path, capsys: Capture) -> None:
    path = made(files, "run")
    changed = files / "ids-sst-dev.csv"
    changed.write_text(changed.read_text().replace("word0", "other", 1))
    found = sections_of(run(capsys, path)[0])
    sst = found["SST-5 sentiment: errors"]
    assert "the file has changed since the run" in " ".join(sst.split()) and "Wrong and surest" not in sst
    assert "precision" in sst and "Wrong and surest" in found["Quora paraphrase: errors"]


def test_plots_that_cannot_be_written_are_a_warning(files: Path, capsys: Capture) -> None:
    path = made(files, "run")
    (path / "plots").write_text("a file")
    out, err = run(capsys, path)
    assert err.startswith("warning: no plots: ") and "STS similarity: errors" in out


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("option", ["pretrain", "individual_pretrain", "finetune --epochs 1 --tasks sst", "test"])
def test_every_kind_of_run_can_be_reported_on(
    option: str, tiny: Path, data: Path, treated_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    trains = f"--model {tiny} --pretrain_epochs 1 --steps_per_epoch 2 --batch_size 4"
    flags = f"--option {option} {f'--checkpoint {treated_run}' if option == 'test' else trains}"
    flags += f" --data {data} --device cpu --cache off --no-tensorboard --out {tmp_path / 'run'}"
    assert multitask_classifier.main(flags.split()) == 0
    shown = sections_of(run(capsys, tmp_path / "run")[0])
    assert ("Quora paraphrase: errors" in shown) == ("--tasks sst" not in option)


def test_several_runs_are_a_table_of_settings_with_tests(files: Path, capsys: Capture) -> None:
    good = [made(files, f"good{s}", 0.1, seed=s, lr=1.0, scheduler="random") for s in range(3)]
    bad = [made(files, f"bad{s}", 0.4, seed=s, lr=2.0, scheduler="random") for s in range(3)]
    out, err = run(capsys, *bad, *good)
    found = sections_of(out)
    assert err == "" and list(found) == ["6 runs of 2 settings", "Differences from the best"]
    lines = found["6 runs of 2 settings"].splitlines()
    assert re.split(r"  +", lines[1])[:5] == ["setting", "sst accuracy", "para accuracy", "sts pearson", "mean"]
    first, second = lines[3:5]
    means = [FinishedRun.read(path).score("mean") for path in good]
    assert first.startswith("lr 1.0 ") and second.startswith("lr 2.0 ") and "*" not in second
    assert f"*{statistics.mean(means):.3f} ±{statistics.stdev(means):.3f}" in first
    assert re.search(
        r"^lr 2.0 +bad0, bad1, bad2 +1 min 41 s +22.7 M +lr 2.0$", "\n".join(lines), flags=re.MULTILINE
    )  # the key
    assert "scheduler" not in out and "threads" not in out
    constant = [FinishedRun.read(good[0]).guesses[task] for task in THREE]
    cells = [f"{score:.3f}" for score in (*constant, statistics.mean(constant))]
    assert lines[5].split() == ["constant", *cells] and constant[0] == pytest.approx(0.2, abs=0.1)
    assert "fine-tuning ended below its frozen stage: bad0, bad1, bad2, good0, good1, good2" in " ".join(out.split())
    rows = [line for line in found["Differences from the best"].splitlines() if line.startswith("lr 2.0")]
    assert len(rows) == 4 and all(row.count("worse, p") == 2 for row in rows)
    assert "t test, paired where both have the same seeds" in found["Differences from the best"]
    assert "there are no settings to compare" in run(capsys, *good)[0]


def test_an_identical_run_shows_no_difference(files: Path, capsys: Capture) -> None:
    copy = shutil.copytree(path := made(files, "a"), files.parent / "copy")
    out, _ = run(capsys, path, copy)
    differences = sections_of(out)["Differences from the best"]
    assert differences.count("no difference, p 1.000") == 4 and "worse" not in differences and "*" not in out
    assert all(re.search(rf"^{name} +{name} +.* -$", out, flags=re.MULTILINE) for name in ("a", "copy"))


def test_other_data_and_other_tasks_are_not_mixed(files: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "b").mkdir()
    other = made(write_dev_files(tmp_path / "b" / "data", 120, seed=1), "other")
    predictions = {"sst": noisy(files, "sst", 0.2, 0)}
    single = write_run(tmp_path / "single", files, predictions)
    out, _ = run(capsys, made(files, "all"), single, other)
    assert "Runs on different data are listed apart" in out and "Means over different tasks are not compared" in out
    rows = [line for line in sections_of(out)["Differences from the best"].splitlines() if line.startswith("tasks")]
    assert len(rows) == 1 and re.match(r"tasks sst  sst +\+0\.083 ", rows[0])
    named = made(write_dev_files(tmp_path / "b" / "data", 120, seed=1), "named", name="mine", lr=9.0)
    settings = settings_of([FinishedRun.read(path) for path in (made(files, "first"), other, named)])
    assert "mine (data #2)" in titles(settings) and not any("#2 (" in title for title in titles(settings))
    labels = [text.get_text() for text in draw_comparison(settings).figure.axes[0].get_yticklabels()]
    assert labels == titles(settings)


def test_csv_has_a_row_a_run_and_the_same_columns_for_all_runs(files: Path, capsys: Capture) -> None:
    runs = [made(files, f"r{s}", seed=s, lr=0.1 + s, checkpoint=s * "runs/first") for s in (0, 1)]
    single = write_run(files.parent / "single", files, {"sst": noisy(files, "sst", 0.2, 0)}, seed=7)
    tables = [run(capsys, *paths, "--csv")[0] for paths in (runs, [single, *runs], [single])]
    assert len({table.splitlines()[0] for table in tables}) == 1
    rows = list(csv.DictReader(io.StringIO(tables[1])))
    assert [row["run"] for row in rows] == [str(path) for path in (single, *runs)]
    assert [row["model"] for row in rows] == [*[FinishedRun.read(single).config["model"]] * 2, "runs/first"]
    for row in rows:
        of = FinishedRun.read(Path(row["run"]))
        for task in THREE:
            for metric in ("pearson", "spearman") if task == "sts" else ("accuracy", "macro_f1"):
                expected = of.results["dev"].get(task, {}).get(metric, "")
                assert row[f"{task}_{metric}"] == str(expected)
        assert float(row["mean"]) == of.score("mean") and int(row["seed"]) == of.config["seed"]
        assert float(row["training_seconds"]) == 100 + of.config["seed"] and row["peak_memory_mb"] == "1024.5"
        assert float(row["lr"]) == of.config["lr"] and json.loads(row["settings"]) == of.config


def test_csv_leaves_empty_what_a_run_did_not_use(files: Path, capsys: Capture) -> None:
    options = {"finetune": {}, "pretrain": {}, "test": {"checkpoint": "runs/finetune"}}
    paths = [made(files, option, option=option, **of, lr=0.5) for option, of in options.items()]
    rows = list(csv.DictReader(io.StringIO(run(capsys, *paths, "--csv")[0])))
    of_training = ("scheduler", "treatment", "epochs", "batch_size", "lr")
    assert [[row[name] for name in of_training] for row in rows] == [
        ["pal", "sum", "5", "32", "0.5"],
        ["pal", "", "", "32", ""],
        ["", "", "", "", ""],
    ]
    assert [row["model"] for row in rows] == ["minilm", "minilm", "runs/finetune"]
    assert all(json.loads(row["settings"])["lr"] == 0.5 for row in rows)


def test_the_constant_of_each_data_is_named(files: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "b").mkdir()
    other = write_dev_files(tmp_path / "b" / "data", 300, seed=1)
    out, _ = run(capsys, made(files, "one"), made(other, "two"))
    assert re.findall(r"^constant \((.+?)\)  ", out, flags=re.MULTILINE) == ["data #1", "data #2"]


def test_csv_has_no_control_characters(files: Path, capsys: Capture) -> None:
    """Names of directories and settings, which a terminal would obey."""
    path = made(files, "a\x1b[2Jb", name="red\x1b[31m", model="\r\x07\x9b")
    out, err = run(capsys, path, "--csv")
    assert err == "" and all(line.isprintable() for line in out.splitlines())
    (row,) = csv.DictReader(io.StringIO(out))
    assert row["run"].endswith(r"/a\x1b[2Jb") and (row["name"], row["model"]) == (r"red\x1b[31m", r"\r\x07\x9b")
    assert json.loads(row["settings"])["name"] == "red\x1b[31m"


@pytest.mark.usefixtures("no_plots")
def test_a_report_says_what_guessing_scores_and_where_one_class_is_predicted_throughout(
    files: Path, capsys: Capture
) -> None:
    predictions = {task: noisy(files, task, 0.2, 0) for task in ("sst", "para")}
    predictions["para"][:] = is_yes = float(labels_of(files, "para").mean() > 0.5)
    path = write_run(files.parent / "run", files, predictions)
    scores = sections_of(run(capsys, path)[0])[f"Run {path}"]
    (line,) = (line for line in scores.splitlines() if line.startswith("Quora paraphrase") and "accuracy" in line)
    assert line.split()[-1] == f"{FinishedRun.read(path).score('para'):.3f}"  # what it scores and what guessing does
    (told,) = (line for line in scores.splitlines() if line.startswith("warning: "))
    assert told == f"warning: para: one class predicted throughout ({'yes' if is_yes else 'no'})"


@pytest.mark.parametrize(("name", "start"), [("p.pdf", b"%PDF"), ("p.svg", b"<?xml"), ("p.png", b"\x89PNG")])
def test_several_runs_are_drawn_into_a_file_of_the_format_of_its_name(
    name: str, start: bytes, files: Path, tmp_path: Path, capsys: Capture
) -> None:
    runs = [made(files, "a", 0.1, lr=1.0), made(files, "b", lr=2.0)]
    run(capsys, *runs, "--plot", tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert "exists already" in run(capsys, *runs, "--plot", tmp_path / name, status=2)[1]


def test_how_many_settings_the_best_was_chosen_from_is_said_of_each_data(files: Path, capsys: Capture) -> None:
    runs = [made(files, f"r{i}", 0.1 * i, lr=float(i)) for i in range(4)]
    words = " ".join(run(capsys, *runs)[0].split())
    assert "The best of 4 settings tends to look better" in words and "of 12 tests about 0.6 would call" in words
    (files.parent / "others").mkdir()
    others = write_dev_files(files.parent / "others" / "data", 120, seed=1)
    runs += [made(others, f"r{i}", 0.1 * i, lr=float(i)) for i in range(2)]
    words = " ".join(run(capsys, *runs)[0].split())
    assert "The best of 4 and of 2 settings tends to look better" in words and "of 16 tests about 0.8 would" in words


def test_markdown_has_the_same_tables(files: Path, capsys: Capture) -> None:
    runs = [made(files, "a", 0.1, lr=1.0), made(files, "b", lr=2.0)]
    lines = run(capsys, *runs, "--markdown")[0].splitlines()
    assert "## Differences from the best" in lines
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert cells[0][:2] == ["setting", "sst accuracy"] and cells[1][0] == "lr 1.0" and cells[1][1].startswith("**")


def test_a_page_holds_tables_and_pictures_of_one_run_and_of_several(
    files: Path, tmp_path: Path, capsys: Capture
) -> None:
    runs = [made(files, f"r{i}", 0.1 * i, lr=float(i)) for i in range(6)]
    for paths, num_pictures in ((runs[:1], NUM_PLOTS), (runs, 1)):
        page = tmp_path / f"{len(paths)}.html"
        out, _ = run(capsys, *paths, "--html", page)
        assert ("The best of 6 settings tends to look better than it is" in " ".join(out.split())) == (len(paths) == 6)
        text = page.read_text()
        assert text.count("data:image/png;base64,") == num_pictures
        assert text.count("<table>") >= 3 and "http" not in text
        assert text.count("<figcaption>") == text.count('alt="') == text.count("<img") and 'alt=""' not in text
    assert not list(tmp_path.glob("*.tmp"))
    (runs[0] / "metrics.jsonl").write_text('{"stage": "s", "epoch": 1, "step": 2, "losses": 3}\n')
    out, err = run(capsys, runs[0], tmp_path / "absent", "--html", tmp_path / "new.html")
    assert "nothing: no run directory" not in out and "losses is '3'" in err
    assert "absent: no run directory" in (tmp_path / "new.html").read_text()


@pytest.mark.usefixtures("no_plots")
def test_what_cannot_be_used_is_named_and_left_out(files: Path, tmp_path: Path, capsys: Capture) -> None:
    whole, going, damaged = (made(files, name) for name in ("whole", "going", "damaged"))
    (going / "results.json").unlink()
    (damaged / "results.json").write_text("{")
    out, err = run(capsys, going, whole, damaged, tmp_path / "absent", whole, f"{whole}/")
    assert len(lines := err.splitlines()) == 3 and all(line.startswith("left out: ") for line in lines)
    assert "going: the run has not ended" in lines[0] and "damaged" in lines[1] and "absent" in lines[2]
    assert out.startswith(f"Run {whole}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{absent}", "{files}"], "error: .*data/absent: no run directory, expected one with config.json; .*data: no"),
        (["{run}", "--html", "{page}"], "error: --html .*page.html: exists already, expected the name of a new file"),
        (["{run}", "--html", "{run}/page.txt"], "error: --html .*page.txt: expected a file name that ends in .html"),
        (["{run}", "--html", "{absent}/page.html"], "error: --html .*page.html: no directory "),
        (["{run}", "--plot", "new.pdf", "--csv"], "error: --plot new.pdf: --csv draws nothing, leave one out"),
        (["{run}", "--plot", "new.pdf"], "error: --plot new.pdf: expected several runs; those of one are in .*plots"),
        (
            ["{run}", "{run}/../other", "--format", "pdf"],
            "error: --format pdf: for the plots of one run; several are dr",
        ),
        (["{run}", "--csv", "--format", "svg"], "error: --format svg: for the plots of one run; several are drawn by"),
        (["{run}", "--plot", "new.gif"], "error: --plot new.gif: expected a file name that ends in .png or .pdf or"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str, files: Path, capsys: Capture) -> None:
    (page := files / "page.html").write_text("precious")
    made(files, "other")
    paths = {"run": made(files, "run"), "absent": files / "absent", "files": files, "page": page}
    out, err = run(capsys, *(argument.format(**paths) for argument in arguments), status=2)
    assert out == "" and re.fullmatch(message + ".*\n", err) and page.read_text() == "precious"


@pytest.mark.parametrize("other", ["--csv", "--markdown", "--html=new.html"])
def test_a_run_is_pushed_or_shown(other: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["runs/a", "--push", "me/x", other])
    assert end.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("results.json", "{", 2),
        ("metrics.jsonl", '{"stage": "finetune", "epoch": 1, "step": 2, "lr": [1]}', 0),
        ("metrics.jsonl", '{"stage": "s", "epoch": 1, "step": 2, "dev": {"sst": {"accuracy": "x"}, "mean": 1}}', 0),
        ("predictions/sts-dev-rows.csv", "\x00", 0),
        ("predictions/sst-dev-rows.csv", None, 0),
    ],
)
def test_damaged_files_are_one_clear_line(
    name: str, content: str | None, status: int, files: Path, capsys: Capture, request: pytest.FixtureRequest
) -> None:
    """(All damages: test_finished_run.py.)"""
    if name.startswith("predictions"):
        request.getfixturevalue("no_plots")
    path = made(files, "run")
    (path / name).unlink() if content is None else (path / name).write_text(content)
    out, err = run(capsys, path, status=status)
    if name.startswith("predictions"):
        assert err == "" and f"Noerroranalysis:{path / name}" in "".join(out.split())  # long paths are broken
        assert "Wrong and surest" in sections_of(out)["Quora paraphrase: errors"] and f"Run {path}" in out
    else:
        assert err.count("\n") == 1 and str(path / name) in err


@pytest.mark.parametrize("arguments", [[], ["run", "--csv", "--markdown"], ["run", "--nothing"]])
def test_a_wrong_command_line_is_one_line_and_status_2(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_compares_runs_without_torch(files: Path) -> None:
    runs = [str(made(files, name, lr=lr)) for name, lr in (("a", 1.0), ("b", 2.0))]
    script = "import sys, reports.report; assert not reports.report.main(sys.argv[1:]); print(*sys.modules)"
    shown = run_python("-c", script, *runs)
    assert "2 runs of 2 settings" in shown
    assert "numpy" in shown.split() and not set(shown.split()) & {"torch", "matplotlib", "transformers"}


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(files: Path) -> None:
    command = [sys.executable, "evaluation.py", str(made(files, "a", lr=1.0)), str(made(files, "b", lr=2.0))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()
