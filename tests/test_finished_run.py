"""Reading back what a run left: whole runs, damaged ones, and dev rows against prediction files and results."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from made_runs import labels_of, made_run, write_dev_files
from reports.finished_run import FinishedRun
from run_record import DevRows, RunError, parse_records
from tasks import TASKS


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return made_run(write_dev_files(tmp_path / "data"), "run", treated=False).path


def test_the_dev_rows_of_a_run_give_its_scores_and_its_prediction_files(treated_run: Path) -> None:
    run = FinishedRun.read(treated_run)
    assert run.tasks == ("sst", "para", "sts")
    for task in run.tasks:
        rows = run.dev_rows(task)
        found = TASKS[task].output.scores(rows.predictions, rows.labels)
        assert found == pytest.approx(run.results["dev"][task], abs=1e-6)
        lines = (treated_run / "predictions" / f"{task}-dev-output.csv").read_text().splitlines()[1:]
        assert [line.split(" , ")[0] for line in lines] == list(rows.ids)
        np.testing.assert_allclose([float(line.split(" , ")[1]) for line in lines], rows.predictions, atol=1e-6)
        np.testing.assert_allclose([e.label for e in run.dev_examples(task)], rows.labels, atol=1e-6)
        assert run.score(task) == run.results["dev"][task]["pearson" if task == "sts" else "accuracy"]
        if rows.probabilities is not None:
            np.testing.assert_allclose(rows.probabilities.sum(1), 1, atol=1e-6)
            assert np.array_equal(rows.probabilities.argmax(1), rows.predictions)
            assert run.guesses[task] == np.bincount(rows.labels.astype(int)).max() / 8
        assert (rows.probabilities is None) == (task == "sts")
    assert run.score("mean") == run.results["dev"]["mean"]


def change(name: str, edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        values = json.loads((run / name).read_text())
        edit(values)
        (run / name).write_text(json.dumps(values))

    return apply


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "run: no run directory, expected one with config.json"),
        (lambda run: (run / "results.json").unlink(), "run: the run has not ended; to go on: python .* --resume=.*run"),
        (write("config.json", "[]"), "config.json: is '\\[]', expected a mapping"),
        (change("config.json", lambda c: c.pop("seed")), "config.json: seed is missing, expected the settings"),
        (change("config.json", lambda c: c.update(tasks=[["sst"]])), "config.json: tasks 0 is "),
        (change("config.json", lambda c: c["data_files"].update(x=3)), "config.json: data_files x is '3'"),
        (write("config.json", '{"option": "fi'), "config.json: not readable as JSON"),
        (write("results.json", '{"dev": {'), "results.json: not readable as JSON"),
        (write("results.json", "[]"), "results.json: is '\\[]', expected a mapping, expected the results of a run"),
        (change("results.json", lambda r: r["dev"].update(sts=0.5)), "results.json: dev sts is '0.5', expected a map"),
        (change("results.json", lambda r: r["dev"]["sst"].update(macro_f1="x")), "results.json: dev sst macro_f1 is"),
        (change("results.json", lambda r: r["confusion"]["para"].pop()), "the confusion of para is not 2 by 2"),
        (change("results.json", lambda r: r.update(gradients={"s": {"cosine": 3}})), "gradients s cosine is '3'"),
        (change("results.json", lambda r: r["dev"].pop("sts")), "results.json: dev sts is missing, expected"),
        (change("results.json", lambda r: r["dev"].update(mean=None)), "results.json: dev mean is missing, expected"),
        (change("results.json", lambda r: r["seconds"].clear()), "results.json: seconds training is missing"),
        (change("config.json", lambda c: c["tasks"].append("nli")), "config.json: task 'nli' is unknown"),
        (change("config.json", lambda c: c.update(tasks=[])), "config.json: there are no tasks"),
    ],
)  # fmt: skip
def test_a_directory_that_is_no_whole_run_is_one_line(damage: Callable[[Path], None], message: str, made: Path) -> None:
    damage(made)
    with pytest.raises(RunError, match=message) as error:
        FinishedRun.read(made)
    assert "\n" not in str(error.value)


def test_texts_are_refused_where_the_data_file_has_changed_and_labels_are_not(made: Path) -> None:
    run = FinishedRun.read(made)
    path = Path(run.config["data"]) / "sts-dev.csv"
    labels = labels_of(path.parent, "sts")
    path.write_text(path.read_text().replace("word1", "word2", 1))
    with pytest.raises(RunError, match=r"sts-dev\.csv: the file has changed since the run"):
        run.dev_examples("sts")
    assert np.array_equal(run.dev_rows("sts").labels, labels)
    path.unlink()
    with pytest.raises(RunError, match=r"sts-dev\.csv: No such file"):
        run.dev_examples("sts")
    shutil.rmtree(path.parent)
    with pytest.raises(RunError, match="no such directory"):
        run.dev_examples("sts")


def test_dev_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    ids = ('a, "b"', "c , d", "plain", "line\nend")
    rows = DevRows(
        ids, np.array([0.0, 1.0, 4.0, 2.0]), np.arange(4.0), draw.dirichlet(np.ones(5), 4).astype(np.float32)
    )
    rows.write(tmp_path / "rows.csv")
    found = DevRows.read(tmp_path / "rows.csv")
    assert found.ids == ids and found.probabilities is not None and rows.probabilities is not None
    assert np.array_equal(found.labels, rows.labels) and np.array_equal(found.predictions, rows.predictions)
    np.testing.assert_allclose(found.probabilities, rows.probabilities, rtol=1e-7)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
    assert (tmp_path / "rows.csv").read_text().startswith("id,label,prediction,probability_0,probability_1,")


@pytest.mark.parametrize(
    "content",
    ["", "id,label,prediction\n", "name,label\na,1\n", "id,label,prediction\na,1\n", "id,label,prediction\na,1,x\n",
     "id,label,prediction\na,1,nan\n", "id,label,prediction\na,1,2\n\n", "\ufffd\x00"],
)  # fmt: skip
def test_damaged_dev_rows_are_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(RunError, match=r"rows.csv: not readable as dev rows \("):
        DevRows.read(tmp_path / "rows.csv")


def test_a_row_that_was_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,label,prediction\na,1,2\nb,1\n")
    with pytest.raises(RunError, match=r"\(row 2 has 2 columns, expected 3\)"):
        DevRows.read(tmp_path / "rows.csv")


@pytest.mark.parametrize("row", ["a,7,1,0.5,0.5", "a,1,0.5,0.5,0.5", "a,1,1,0.2,0.3,0.5"])
def test_dev_rows_of_another_task_are_refused(row: str, made: Path) -> None:
    header = ",".join(["id", "label", "prediction", *(f"probability_{k}" for k in range(row.count(",") - 2))])
    (made / "predictions" / "para-dev-rows.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(RunError, match=r"para-dev-rows\.csv: not the dev rows of para, expected 0 or 1"):
        FinishedRun.read(made).dev_rows("para")


def test_a_line_that_is_no_record_is_passed_over_and_a_run_without_a_log_has_none(made: Path) -> None:
    whole = b'{"stage": "finetune", "epoch": 1, "step": 1, "losses": {"sst": null}}\n'
    records = parse_records(whole + b"\n[1]\nnull\n\xff\n" + whole + b'{"stage": "finetune", "epo')
    assert [record["losses"] for record in records] == [{"sst": None}] * 2
    assert len(FinishedRun.read(made).records()) == 84
    (made / "metrics.jsonl").unlink()
    assert FinishedRun.read(made).records() == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [({"losses": {"sst": "x"}}, "losses sst is 'x'"), ({"dev": 0.5}, "dev is '0.5', expected a mapping"),
     ({"cosines": [1]}, "cosines is '[1]', expected a mapping"), ({"step": None}, "step is missing")],
)  # fmt: skip
def test_a_damaged_record_is_one_line(damage: dict, problem: str, made: Path) -> None:
    with (made / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "finetune", "epoch": 1, "step": 7, **damage}) + "\n")
    with pytest.raises(RunError) as error:
        FinishedRun.read(made).records()
    assert f"metrics.jsonl: {problem}" in str(error.value) and "\n" not in str(error.value)
