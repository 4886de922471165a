"""The command on one run and on several: what it prints, writes and refuses, and that it does not wait for torch."""

import csv
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import multitask_classifier
import plots
from finished_run import FinishedRun
from made_runs import noisy, training_records, write_dev_files, write_run
from report import main, run_sections
from tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_dev_files(tmp_path / "data", 120)


def made(files: Path, name: str, noise: float = 0.3, **flags: Any) -> Path:
    predictions = {task: noisy(files, task, noise, flags.get("seed", 0)) for task in TASKS}
    return write_run(files.parent / name, files, predictions, training_records(is_treated=True), **flags)


def run(capsys: Captured, *arguments: Any, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    shown = capsys.readouterr()
    return shown.out, shown.err


def sections_of(text: str) -> dict[str, str]:
    parts = re.split(r"^(.+)\n-+\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# ------------------------------------------------------------------------------------------------------- one run


def test_one_run_has_its_plots_written_anew_its_scores_errors_and_paths(
    treated_run: Path, tmp_path: Path, capsys: Captured
) -> None:
    copy = shutil.copytree(treated_run, tmp_path / "copy", ignore=shutil.ignore_patterns("last"))
    shutil.rmtree(copy / "plots")
    out, err = run(capsys, copy)
    assert err == "" and len(list((copy / "plots").iterdir())) == 7
    found = sections_of(out)
    results = json.loads((copy / "results.json").read_text())
    scores = found[f"Run {copy}"]
    for task in TASKS:
        for name, value in results["dev"][task].items():
            assert re.search(rf"{TASKS[task].title} +8 .*{name} +{value:.3f}".replace("-", "[-]"), scores)
    gradients = found["Task gradients under pcgrad"]
    assert f"{results['gradients']['finetune']['cosine']['sst-sts']:.3f}" in gradients
    assert {f"{task.title}: errors" for task in TASKS.values()} <= set(found)
    for path in (*(copy / "plots").iterdir(), copy / "results.json", copy / "predictions", copy / "best"):
        assert str(path) in found["Plots and files"]


def test_errors_are_shown_with_file_line_and_text(files: Path, capsys: Captured) -> None:
    found = sections_of(run(capsys, made(files, "run"))[0])
    text = (files / "quora-dev.csv").read_text().splitlines()
    rows = re.findall(r"quora-dev\.csv:(\d+) +(\d) +(\d) +(0\.\d+)  (\S+)", found["Quora paraphrase: errors"])
    assert len(rows) == 5
    for line, label, prediction, _, first_word in rows:
        cells = text[int(line) - 1].split("\t")
        assert cells[-1] == label != prediction and cells[2].split()[0] == first_word
    assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)
    assert "Largest errors:" in found["STS similarity: errors"]
    assert "words" in found["SST-5 sentiment: errors"] and "class" in found["SST-5 sentiment: errors"]


def test_changed_data_are_said_and_errors_by_text_left_out(files: Path, capsys: Captured) -> None:
    path = made(files, "run")
    changed = files / "ids-sst-dev.csv"
    changed.write_text(changed.read_text().replace("word0", "other", 1))
    found = sections_of(run(capsys, path)[0])
    sst = found["SST-5 sentiment: errors"]
    assert "the file has changed since the run" in " ".join(sst.split()) and "Wrong and surest" not in sst
    assert "precision" in sst and "Wrong and surest" in found["Quora paraphrase: errors"]


def test_a_run_without_probabilities_says_how_to_get_them(files: Path, capsys: Captured) -> None:
    predictions = {task: noisy(files, task, 0.3, 0) for task in TASKS}
    path = write_run(files.parent / "old", files, predictions, has_rows=False)
    found = sections_of(run(capsys, path)[0])
    assert "--option test --checkpoint" in found["SST-5 sentiment: errors"]
    assert "accuracy" in found["SST-5 sentiment: errors"]
    shutil.rmtree(files)
    assert "No error analysis:" in sections_of(run(capsys, path)[0])["SST-5 sentiment: errors"]


def test_plots_that_cannot_be_written_are_a_warning(files: Path, capsys: Captured) -> None:
    path = made(files, "run")
    (path / "plots").write_text("a file")
    out, err = run(capsys, path)
    assert err.startswith("warning: no plots: ") and "STS similarity: errors" in out


@pytest.mark.parametrize(
    "option", ["--option pretrain", "--option individual_pretrain", "--tasks sst", "--option test"]
)
def test_every_kind_of_run_can_be_reported_on(
    option: str, tiny: Path, data: Path, treated_run: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "run"
    trains = f"--model {tiny} --pretrain_epochs 1 --steps_per_epoch 2"
    flags = f"--checkpoint {treated_run}" if option == "--option test" else trains
    flags += " --epochs 1" if option == "--tasks sst" else ""
    common = f"--data {data} --device cpu --batch_size 4 --cache off --no-tensorboard --out {out}"
    assert multitask_classifier.main([*option.split(), *flags.split(), *common.split()]) == 0
    shown = sections_of(run(capsys, out)[0])
    assert ("Quora paraphrase: errors" in shown) == (option != "--tasks sst")
    assert (out / "plots" / "confusion.png").exists()


def test_a_failure_to_draw_does_not_end_a_run(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def fail(run: FinishedRun) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plots, "write_plots", fail)
    flags = "--option pretrain --pretrain_epochs 1 --steps_per_epoch 1 --device cpu --cache off --no-tensorboard"
    arguments = [*flags.split(), "--model", str(tiny), "--data", str(data), "--out", str(tmp_path / "run")]
    assert multitask_classifier.main(arguments) == 0
    assert "warning: no plots: no fonts" in capsys.readouterr().out
    assert FinishedRun.read(tmp_path / "run").score("mean") is not None


# ------------------------------------------------------------------------------------------------- several runs


def test_several_runs_are_a_table_of_settings_with_tests_and_agreement(files: Path, capsys: Captured) -> None:
    good = [made(files, f"good{s}", 0.1, seed=s, lr=1.0, scheduler="random") for s in range(3)]
    bad = [made(files, f"bad{s}", 0.4, seed=s, lr=2.0, scheduler="random") for s in range(3)]
    out, err = run(capsys, *bad, *good)
    found = sections_of(out)
    assert err == "" and list(found) == [
        "6 runs of 2 settings",
        "Differences from the best",
        "Agreement between two runs",
    ]
    header, first, second = found["6 runs of 2 settings"].splitlines()[:3]
    assert header.split()[:3] == ["runs", "n", "lr"] and "scheduler" not in header and "threads" not in header
    assert first.startswith("good0 and 2 more  3  1.0") and second.startswith("bad0 and 2 more   3  2.0")
    means = [FinishedRun.read(path).score("mean") for path in good]
    assert f"{statistics.mean(means):.3f} ± {statistics.stdev(means):.3f}*" in first and "*" not in second
    rows = [line for line in found["Differences from the best"].splitlines() if line.startswith("lr 2.0")]
    assert len(rows) == 4 and all("worse" in row for row in rows)
    assert "paired t, n = 3" in found["Differences from the best"]
    agreed = re.findall(r"good0, bad0 +(\w+) +(\w+) +(\S+)", found["Agreement between two runs"])
    assert [(task, what) for task, what, _ in agreed] == [("sst", "equal"), ("para", "equal"), ("sts", "pearson")]


def test_runs_of_one_setting_are_told_to_be_so(files: Path, capsys: Captured) -> None:
    out, _ = run(capsys, made(files, "a", seed=0), made(files, "b", seed=1))
    assert "there are no settings to compare" in out and "a, b" in sections_of(out)["Agreement between two runs"]


def test_an_identical_run_shows_no_difference(files: Path, capsys: Captured) -> None:
    path = made(files, "a")
    copy = shutil.copytree(path, path.with_name("copy"))
    out, _ = run(capsys, path, copy)
    differences = sections_of(out)["Differences from the best"]
    assert differences.count("no difference") == 4 and "worse" not in differences and "*" not in out
    assert re.search(r"a, copy +sst +equal +1.000 +kappa +1.000", out)


def test_twenty_runs_are_compared_and_the_choice_of_the_best_is_cautioned(files: Path, capsys: Captured) -> None:
    runs = [made(files, f"r{i}", 0.1 + 0.02 * (i % 5), seed=i // 5, lr=float(i % 5)) for i in range(20)]
    out, _ = run(capsys, *runs)
    assert "20 runs of 5 settings" in out and "The best of 5 settings tends to look better than it is" in out
    means = [float(m) for m in re.findall(r"^r\d+ and 3 more +4 .* (0\.\d+) ± 0\.\d+\*? +1", out, flags=re.MULTILINE)]
    assert len(means) == 5 and means == sorted(means, reverse=True)


def test_other_data_and_other_tasks_are_not_mixed(files: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "b").mkdir()
    other = made(write_dev_files(tmp_path / "b" / "data", 120, seed=1), "other")
    predictions = {"sst": noisy(files, "sst", 0.2, 0)}
    single = write_run(tmp_path / "single", files, predictions)
    out, _ = run(capsys, made(files, "all"), single, other)
    assert "Runs on different data are listed apart" in out and "Means over different tasks are not compared" in out
    rows = [line for line in sections_of(out)["Differences from the best"].splitlines() if line.startswith("tasks")]
    assert len(rows) == 1 and rows[0].startswith("tasks sst  sst ")


def test_csv_has_every_number_in_full(files: Path, capsys: Captured) -> None:
    runs = [made(files, f"r{lr}{s}", seed=s, lr=float(lr)) for lr in (1, 2) for s in (0, 1)]
    rows = list(csv.DictReader(io.StringIO(run(capsys, *runs, "--csv")[0])))
    assert len(rows) == 2
    for row in rows:
        own = [FinishedRun.read(Path(path)) for path in row["runs"].split()]
        assert row["seeds"] == "0 1" and row["n"] == "2" and float(row["lr"]) == own[0].config["lr"]
        for name, title in (("sst", "sst accuracy"), ("sts", "sts pearson"), ("mean", "mean")):
            values = [of.score(name) for of in own]
            assert float(row[title]) == pytest.approx(statistics.mean(values), rel=1e-12)
            assert float(row[f"{title} sd"]) == pytest.approx(statistics.stdev(values), rel=1e-9)
        assert row["parameters"] == "22700000" and float(row["training_seconds"]) == 100.5


def test_markdown_has_the_same_tables(files: Path, capsys: Captured) -> None:
    runs = [made(files, "a", 0.1, lr=1.0), made(files, "b", lr=2.0)]
    out, _ = run(capsys, *runs, "--markdown")
    assert "| runs | n | lr |" in out and "| a | 1 | 1.0 |" in out and "## Differences from the best" in out


def test_a_page_holds_tables_and_pictures_of_one_run_and_of_several(
    files: Path, tmp_path: Path, capsys: Captured
) -> None:
    runs = [made(files, f"r{i}", 0.1 * i, lr=float(i)) for i in range(6)]
    for number, paths in ((1, runs[:1]), (6, runs)):
        page = tmp_path / f"{number}.html"
        run(capsys, *paths, "--html", page)
        text = page.read_text()
        # One run: its seven plots. Several: two pictures of all, and the plots that there are of the first settings.
        assert text.count("data:image/png;base64,") == (7 if number == 1 else 2 + 7)
        assert text.count("<table>") >= 3 and "http" not in text
    assert not list(tmp_path.glob("*.tmp"))
    before = (tmp_path / "1.html").read_text()
    run(capsys, *runs, tmp_path / "nothing", "--html", tmp_path / "1.html", "--csv")
    assert (after := (tmp_path / "1.html").read_text()) != before and "nothing: no run directory" in after


# ------------------------------------------------------------------------------------------------------ bad input


def test_what_cannot_be_used_is_named_and_left_out(files: Path, tmp_path: Path, capsys: Captured) -> None:
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
        (["{absent}"], "error: no run to report on, expected at least one directory of a run that has ended"),
        (["{run}", "--html", "{run}/page.txt"], "error: --html .*page.txt: expected a file name that ends in .html"),
        (["{run}", "--html", "{absent}/page.html"], "error: --html .*page.html: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str, files: Path, capsys: Captured) -> None:
    paths = {"run": made(files, "run"), "absent": files / "absent"}
    _, err = run(capsys, *(argument.format(**paths) for argument in arguments), status=2)
    assert re.fullmatch(message + ".*", err.splitlines()[-1]) and "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["run", "--csv", "--markdown"], ["run", "--nothing"]])
def test_a_wrong_command_line_is_one_line_and_status_2(arguments: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# --------------------------------------------------------------------------------------------------- the command


def test_the_command_compares_runs_without_torch(files: Path) -> None:
    runs = [str(made(files, name, lr=lr)) for name, lr in (("a", 1.0), ("b", 2.0))]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "evaluation.py", *runs],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "2 runs of 2 settings" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported and not imported & {"torch", "matplotlib", "transformers"}


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(files: Path) -> None:
    command = [sys.executable, "evaluation.py", str(made(files, "a", lr=1.0)), str(made(files, "b", lr=2.0))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()


def test_pictures_are_only_read_for_a_page(treated_run: Path) -> None:
    (*_, last) = run_sections(FinishedRun.read(treated_run), sorted((treated_run / "plots").iterdir()))
    assert len([block for block in last.blocks if not isinstance(block, str)]) == 7
