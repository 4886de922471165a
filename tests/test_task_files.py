"""Tasks from a TOML file: read, refused, trained beside the built-in ones, and known again from what they have left."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_command import Runs, assert_same_run, runs

import multitask_classifier
import run as running
from bert import CheckpointError
from config import FlagError, parse
from datasets import DataError, read_examples
from helpers import THREE, WORDS, Capture, Patch, cases
from predictor import load
from reports.data_report import main as describe
from reports.finished_run import FinishedRun
from reports.model_card import write_model
from reports.report import main as report
from task_files import TaskFileError, add_saved_tasks, read_task_file
from tasks import TASKS, Binary, Classes, Score

CLASSES = ["entailment", "neutral", "contradiction"]
NLI = """
[nli]
title = "Entailment"
files = { train = "nli-train.jsonl", dev = "nli-dev.jsonl", test = "nli-test.jsonl" }
texts = ["premise", "hypothesis"]
label = "relation"
id = "uid"
kind = "classes"
classes = ["entailment", "neutral", "contradiction"]
metric = "macro_f1"
"""
VALENCE = """
[valence]
folder = "words"
files = { train = "train.csv", dev = "dev.csv" }
texts = ["text"]
label = "valence"
kind = "score"
range = [-1, 1]
metric = "spearman"
"""
BUILT_IN = """
[sst]
title = "SST-5 sentiment"
files = { train = "ids-sst-train.csv", dev = "ids-sst-dev.csv", test = "ids-sst-test-student.csv" }
texts = ["sentence"]
label = "sentiment"
id = "id"
kind = "classes"
classes = ["very negative", "negative", "neutral", "positive", "very positive"]
delimiter = "\\t"

[para]
title = "Quora paraphrase"
files = { train = "quora-train.csv", dev = "quora-dev.csv", test = "quora-test-student.csv" }
texts = ["sentence1", "sentence2"]
label = "is_duplicate"
id = "id"
kind = "binary"
delimiter = "\\t"
prediction_header = "Predicted_Is_Paraphrase"

[sts]
title = "STS similarity"
files = { train = "sts-train.csv", dev = "sts-dev.csv", test = "sts-test-student.csv" }
texts = ["sentence1", "sentence2"]
label = "similarity"
id = "id"
kind = "score"
range = [0, 5]
delimiter = "\\t"
prediction_header = "Predicted_Similiary"
"""

__all__ = ["runs"]  # the fixture


@pytest.fixture(autouse=True)
def tasks() -> Iterator[None]:
    """Tasks that a test adds are gone behind it."""
    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)


def forget() -> None:
    """As in a process that knows the built-in tasks alone."""
    for name in ("nli", "valence"):
        TASKS.pop(name, None)


def write_nli(path: Path, num_rows: int, draw: random.Random) -> None:
    """Pairs of which the second repeats the first, is of other words, or denies it; labels by name and by number."""
    lines = []
    for i in range(num_rows):
        label, first = draw.randrange(3), draw.sample(WORDS, 4)
        second = [first, draw.sample([word for word in WORDS if word not in first], 4), ["not", *first]][label]
        named = {"uid": f"n{i}", "relation": CLASSES[label] if i % 2 else label, "source": ["made", i]}
        lines.append(json.dumps({"premise": " ".join(first), "hypothesis": " ".join(second), **named}))
    path.write_text("\n".join(lines) + "\n")


def write_valence(path: Path, num_rows: int, draw: random.Random) -> None:
    """Sentences of praise and blame, quoted with commas and line ends in them, and what share of it is praise."""
    lines = ["valence,text"]
    for _ in range(num_rows):
        words = [draw.choice(["good", "bright", "bad", "dull"]) for _ in range(5)]
        score = sum(1 if word in ("good", "bright") else -1 for word in words) / 5
        lines.append(f'{score},"{", ".join(words)},\na film, a ""song"""')
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task file with an entailment task, 600 rows of JSON, and a score from -1 to 1, in csv."""
    folder, draw = tmp_path_factory.mktemp("own"), random.Random(0)
    (folder / "words").mkdir()
    for split, size in (("train", 400), ("dev", 100), ("test", 100)):
        write_nli(folder / f"nli-{split}.jsonl", size, draw)
    for split, size in (("train", 60), ("dev", 30)):
        write_valence(folder / "words" / f"{split}.csv", size, draw)
    path = folder / "my_tasks.toml"
    path.write_text(NLI + VALENCE)
    return path


def test_a_file_says_what_its_tasks_are(file: Path) -> None:
    nli, valence = read_task_file(file)
    assert (nli.name, nli.title, nli.text_columns, nli.label_column) == (
        "nli",
        "Entailment",
        ("premise", "hypothesis"),
        "relation",
    )
    assert nli.output == Classes(3, tuple(CLASSES), "macro_f1", reads_names=True)
    assert valence.output == Score(-1.0, 1.0, selection_metric="spearman") and valence.title == "valence"
    assert (nli.prediction_header, valence.file_name("test")) == ("Predicted_Relation", "")
    assert valence.path("dev", Path("elsewhere")) == file.parent / "words" / "dev.csv"
    assert [nli.file_key("dev"), valence.file_key("dev")] == ["nli-dev", "valence-dev"]


def test_the_built_in_tasks_can_be_written_so(tmp_path: Path) -> None:
    (tmp_path / "three.toml").write_text(BUILT_IN)
    for task in read_task_file(tmp_path / "three.toml"):
        named = TASKS[task.name].output
        output = replace(named, reads_names=True) if isinstance(named, Classes | Binary) else named
        assert task == replace(TASKS[task.name], output=output, folder=str(tmp_path.resolve()))


def test_written_so_they_train_to_the_same_bytes(runs: Runs, data: Path, tmp_path: Path) -> None:
    """From the command line to the predictions: the same tokens, labels, losses and metrics."""
    flags = "--pcgrad --tasks sst para sts"
    whole = runs.whole(flags)
    path = tmp_path / "data" / "three.toml"
    shutil.copytree(data, path.parent)
    path.write_text(BUILT_IN)
    TASKS.clear()
    found = runs.run(tmp_path / "run", f"{flags} --task_file {path}")
    assert_same_run(found, whole)
    assert (found / "predictions" / "sst-dev-output.csv").read_bytes() != b""


@pytest.mark.parametrize("case", cases("wrong_task_files.txt"))
def test_a_wrong_task_file_is_one_line(case: str, tmp_path: Path) -> None:
    change, _, words = (part.strip() for part in case.partition(" | "))
    entry = NLI.strip().split("\n")
    if change.startswith("="):
        entry = [change[1:]]
    elif change.startswith("["):
        entry[0] = change
    else:
        key = change.removeprefix("- ").split(" =")[0]
        entry = [line for line in entry if not line.startswith(f"{key} =")] + [change] * (not change.startswith("- "))
    (tmp_path / "my.toml").write_text("\n".join(entry))
    with pytest.raises(FlagError) as caught:
        parse(["--task_file", str(tmp_path / "my.toml")])
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words.split(" ")), caught.value
    assert str(caught.value).startswith(f"--task_file {tmp_path / 'my.toml'}: " if "[type]" not in case else "--tasks")


def test_a_task_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes("[nli]\ntitle = 'caf\xe9'".encode("latin-1"))
    for name, found in (("none.toml", "No such file"), ("", "not a regular file"), ("latin.toml", "0xe9")):
        with pytest.raises(TaskFileError, match=f"--task_file {tmp_path / name}: .*{found}"):
            read_task_file(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            '{"premise": "a", "hypothesis": "b", "relation": "maybe", "uid": 1}',
            "relation is 'maybe' entailment, neutral",
        ),
        ('{"premise": "a", "hypothesis": "b", "relation": 3, "uid": 1}', "relation is '3' a number from 0 to 2"),
        ('{"premise": "a", "relation": 0, "uid": 1}', "no 'hypothesis' expected an object with uid, premise"),
        ('{"premise": ["a"], "hypothesis": "b", "relation": 0, "uid": 1}', "premise is a list"),
        ('{"premise": "\\ud800", "hypothesis": "b", "relation": 0, "uid": 1}', "not readable as JSON surrogates"),
        ('["a", "b"]', "found list expected an object"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"premise": "a"', "not readable as JSON"),
        ('{"premise": "\xff"}', "not readable as JSON utf-8"),
    ],
)
def test_a_wrong_line_of_json_is_named(line: str, words: str, file: Path, tmp_path: Path) -> None:
    good = '{"premise": "a", "hypothesis": "b", "relation": null, "uid": 7}'
    (tmp_path / "rows.jsonl").write_bytes(f"{good}\n\n{line}\n".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path / "rows.jsonl", read_task_file(file)[0], labelled=True)
    shown = str(caught.value)
    assert shown.startswith(f"{tmp_path / 'rows.jsonl'}:3: ") and all(word in shown for word in words.split()), shown


def test_rows_are_read_by_the_ending_of_their_file(file: Path, tmp_path: Path) -> None:
    """Classes by name and number, true and false, quotes, other delimiters; rows without an id go by their lines."""
    nli, valence = read_task_file(file)
    rows = read_examples(nli.path("dev", Path()), nli, labelled=True).examples
    raw = [json.loads(line) for line in nli.path("dev", Path()).read_text().splitlines()]
    classes = [CLASSES.index(row["relation"]) if isinstance(row["relation"], str) else row["relation"] for row in raw]
    assert [row.label for row in rows] == classes and [row.id for row in rows] == [row["uid"] for row in raw]
    assert [row.texts for row in rows] == [(row["premise"], row["hypothesis"]) for row in raw]
    rows = read_examples(valence.path("dev", Path()), valence, labelled=True).examples
    assert rows[0].texts[0].endswith(',\na film, a "song"') and {-1 <= row.label <= 1 for row in rows} == {True}
    assert [(row.id, row.line) for row in rows[:2]] == [("2", 2), ("4", 4)]
    same = replace(
        nli, text_columns=("a",), label_column="b", id_column="", delimiter=";", output=Binary(reads_names=True)
    )
    (tmp_path / "x.txt").write_text("b;a\nyes;one, two\n0;three\n;none\n")
    found = read_examples(tmp_path / "x.txt", same, labelled=True)
    assert [(row.texts, row.label) for row in found.examples] == [(("one, two",), 1.0), (("three",), 0.0)]
    assert found.skipped == (4,)
    (tmp_path / "x.jsonl").write_text('\ufeff{"a": "one", "b": true}\n{"a": 2.5, "b": false}\n{"a": "x", "b": null}\n')
    found = read_examples(tmp_path / "x.jsonl", same, labelled=True)
    assert [(row.texts, row.label) for row in found.examples] == [(("one",), 1.0), (("2.5",), 0.0)]
    (tmp_path / "open.csv").write_text('b,a\n1,"one\n0,two\n')
    with pytest.raises(DataError, match=r"open\.csv:3: unexpected end of data"):
        read_examples(tmp_path / "open.csv", replace(same, delimiter=""), labelled=True)
    (tmp_path / "wrong.csv").write_text("b\ta\n1\tone\n")
    with pytest.raises(DataError, match=r"no ',' in the header 'b.ta', expected ','-separated columns"):
        read_examples(tmp_path / "wrong.csv", replace(same, delimiter=""), labelled=True)


def test_names_that_are_numbers_are_names() -> None:
    stars = Classes(3, ("1", "2", "3"), reads_names=True)
    assert [stars.parse(text) for text in ("1", "3")] == [0, 2] and stars.allowed == "one of 1, 2, 3"
    with pytest.raises(ValueError, match="0"):
        stars.parse("0")


@pytest.fixture(scope="module")
def five(runs: Runs, file: Path) -> Path:
    """A short run of five tasks. Not to be changed."""
    before = dict(TASKS)
    path = runs.whole(f"--pcgrad --batch_size 8 --task_file {file}")
    TASKS.clear()
    TASKS.update(before)
    return path


def test_all_tasks_train_together_and_their_file_is_not_needed_again(
    five: Path, file: Path, runs: Runs, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    saved = json.loads((five / "config.json").read_text())
    assert saved["tasks"] == [*THREE, "nli", "valence"] and saved["data_files"]["nli-dev"]["rows"] == 100
    scores = json.loads((five / "results.json").read_text())
    assert len(scores["confusion"]["nli"]) == 3 and set(scores["dev"]["valence"]) == {"pearson", "spearman"}
    written = (five / "predictions" / "nli-test-output.csv").read_text().splitlines()
    assert written[0] == "id \t Predicted_Relation " and written[1].startswith("n0 , ") and len(written) == 101
    assert not (five / "predictions" / "valence-test-output.csv").exists()
    file.rename(tmp_path / "gone.toml")
    try:
        assert set(load(five).predict("nli", [("a film", "a song")])) <= {0, 1, 2}
        assert -1 <= load(five).predict("valence", ["good, bright"])[0] <= 1
        forget()
        tested = runs.run(tmp_path / "test", f"--checkpoint {five} --option test")
        again = json.loads((tested / "results.json").read_text())
        assert again["dev"] == scores["dev"]
        forget()
        (tmp_path / "texts").write_text("good\nbad\n")
        line = f"--option predict --checkpoint {five / 'best'} --task valence --input {tmp_path / 'texts'} --device cpu"
        capsys.readouterr()
        assert multitask_classifier.main(line.split()) == 0
        assert all(-1 <= float(line) <= 1 for line in capsys.readouterr().out.split())
    finally:
        (tmp_path / "gone.toml").rename(file)


def test_a_run_of_own_tasks_names_their_files_where_these_are_gone_and_its_leaks_in_a_command_to_be_pasted(
    runs: Runs, tmp_path: Path, capsys: Capture
) -> None:
    own = tmp_path / "own"
    (own / "words").mkdir(parents=True)
    for split in ("train", "dev"):
        write_valence(own / "words" / f"{split}.csv", 40, random.Random(0))
    (own / "my_tasks.toml").write_text(VALENCE)
    out = runs.run(tmp_path / "run", f"--option pretrain --tasks valence --task_file {own / 'my_tasks.toml'}")
    data = json.loads((out / "config.json").read_text())["data"]
    assert f"`python datasets.py {data} --task_file={own / 'my_tasks.toml'}`" in capsys.readouterr().out
    shutil.rmtree(own)
    forget()
    capsys.readouterr()
    assert (
        multitask_classifier.main(["--option", "test", "--checkpoint", str(out), "--out", str(tmp_path / "test")]) == 2
    )
    assert capsys.readouterr().err.startswith(f"error: {own / 'words' / 'dev.csv'}: No such file or directory")


def test_it_is_reported_compared_and_drawn(five: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(five, copy)
    assert report([str(copy)]) == 0
    assert {"valence-valence.png", "confusion.png", "dev-scores.png"} <= {
        path.name for path in (copy / "plots").iterdir()
    }
    shown = capsys.readouterr().out
    assert "Entailment: errors" in shown and "nli-dev.jsonl:" in shown and "true valence" in shown
    guess = FinishedRun.read(copy).guesses["nli"]
    counts = FinishedRun.read(copy).confusion["nli"].sum(1)
    assert guess == pytest.approx(2 * counts.max() / (counts.max() + counts.sum()) / 3)  # its F1 alone is not 0
    assert report([str(copy), str(five), "--csv"]) == 0
    header = capsys.readouterr().out.split("\n")[0].split(",")
    assert {"nli_macro_f1", "valence_spearman", "sst_accuracy"} <= {*header}


def test_killed_and_resumed_without_the_file_it_equals_the_undisturbed_run(
    five: Path, file: Path, runs: Runs, tmp_path: Path
) -> None:
    """In fine-tuning, and before there is any checkpoint."""
    flags = f"--pcgrad --batch_size 8 --task_file {file}"
    for number in (8, 1):
        out = tmp_path / str(number)
        runs.kill(out, flags, "step", number)
        file.rename(tmp_path / "gone.toml")
        try:
            forget()
            assert multitask_classifier.main(["--resume", str(out)]) == 0
        finally:
            (tmp_path / "gone.toml").rename(file)
        forget()
        assert_same_run(out, five)
        for name in ("nli-test-output.csv", "valence-dev-rows.csv"):
            assert (out / "predictions" / name).read_bytes() == (five / "predictions" / name).read_bytes()


def test_tasks_of_the_same_name_that_mean_something_else_are_refused(five: Path, file: Path, tmp_path: Path) -> None:
    other = NLI.replace('"neutral", "contradiction"', '"contradiction", "neutral"')
    (tmp_path / "other.toml").write_text(other)
    with pytest.raises(CheckpointError, match=r"task nli is 2 texts, entailment, neutral.*in use is nli with 2 texts"):
        running.resolve(parse(["--task_file", str(tmp_path / "other.toml"), "--checkpoint", str(five)]))
    for definition, found in ((3, "nli is 3"), ({"kind": "classes"}, "no 'files'")):
        with pytest.raises(TaskFileError, match=f"here: .*{found}"):
            add_saved_tasks({"tasks": {"nli": {"definition": definition}}}, "here")


def test_what_goes_to_a_hub_can_be_loaded_and_names_no_folder(five: Path, file: Path, tmp_path: Path) -> None:
    write_model(FinishedRun.read(five), tmp_path / "model", "me/mine")
    assert str(file.parent) not in (tmp_path / "model" / "config.json").read_text()
    found, expected = (load(path).predict("valence", ["good", "bad"]) for path in (tmp_path / "model", five))
    assert found == expected


def test_its_data_are_described(file: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    picture = tmp_path / "data.png"
    assert describe([str(data), "--task_file", str(file), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "nli  Entailment" in shown and "valence-dev.csv" not in shown and "labels    from -1 to 1" in shown
    assert picture.stat().st_size > 10_000
    assert describe([str(data), "--task_file", "none.toml"]) == 2
    assert capsys.readouterr().err.startswith("error: --task_file none.toml: No such file")
