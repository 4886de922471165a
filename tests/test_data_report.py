"""The description of a data directory, against counts made by hand and by other means."""

import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from datasets import Tokenizer
from helpers import Capture, Patch, write_vocabulary
from reports import data_report
from reports.data_report import describe_folder, draw, report
from tasks import TASKS

TRAIN = [("a b", "0"), ("A  b", "1"), ("c", "4"), ("d e f", "0"), ("g", ""), ("c", "4")]
DEV = [("c", "2"), ("f", "1")]
OWN_TASK = """[own]
folder = "nope"
files = { train = "own-train.csv", dev = "own-dev.csv" }
texts = ["text"]
label = "label"
kind = "binary"
"""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_vocabulary(tmp_path / "words", "abcdefg"), 5)


def write(path: Path, header: str, rows: list[tuple[str, ...]]) -> Path:
    path.write_text("\n".join([header, *(f"{i}\t" + "\t".join(row) for i, row in enumerate(rows))]) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "files"
    target.mkdir()
    write(target / "ids-sst-train.csv", "id\tsentence\tsentiment", TRAIN)
    write(target / "ids-sst-dev.csv", "id\tsentence\tsentiment", DEV)
    write(target / "ids-sst-test-student.csv", "id\tsentence", [("a b c d e f g",)])
    write(target / "sts-train.csv", "id\tsentence1\tsentence2\tsimilarity", [("a", "b", "1.5"), ("b", "a", "2.5")])
    return target


def lines(folder: Path, tokenizer: Tokenizer) -> list[str]:
    return list(report(describe_folder(folder, tokenizer)))


def test_the_report_holds_what_stands_in_the_files(folder: Path, tokenizer: Tokenizer) -> None:
    text = "\n".join(lines(folder, tokenizer))
    for expected in (
        "ids-sst-train.csv                5 rows",
        "very negative 2 (40.0%), negative 1 (20.0%), neutral 0 (0.0%), positive 0 (0.0%), very positive 2 (40.0%)",
        "2 rows, 1 with another label; lines 3 = 2, 7 = 4",
        "1 row without a label: ids-sst-train.csv:6",
        "warning: 1 of 2 dev rows stand in the training file too; lines (dev = train) 2 = 4",
        "1 row longer than the model takes",
        "from 1.5 to 2.5, mean 2.00, standard deviation 0.50",
        "1 row, 1 with another label; lines 3 = 2",
        "dev sts-dev.csv warning: not there, training needs it",
    ):
        assert " ".join(expected.split()) in " ".join(text.split()), f"{expected!r} not in\n{text}"
    assert text.count("longer than the model takes") == 1 and text.count("not there") == 1
    assert "para" not in text and "empty" not in text
    path = write(folder / "ids-sst-dev.csv", "id\tsentence\tsentiment", [("f", "1"), (" ", "2")])
    assert "  no dev row stands in the training file" in lines(folder, tokenizer)
    assert "        empty     1 row with a text of nothing but spaces; lines 3" in lines(folder, tokenizer)
    assert "of another" not in text
    path.write_text(path.read_text().replace("\n1\t", "\n0\t"))
    assert "        ids       2 rows with the id of another; lines 2, 3" in lines(folder, tokenizer)


def test_the_picture_shows_shares_of_labels_and_lengths(folder: Path, tokenizer: Tokenizer) -> None:
    figure = draw(describe_folder(folder, tokenizer)).figure
    labels, scale, lengths, _ = figure.axes
    shares = [patch.get_data().values.tolist() for patch in (*labels.patches, scale.patches[0])]
    assert shares == [[40, 20, 0, 0, 40], [0, 50, 50, 0, 0], [0, 50, 50, 0, 0]]
    assert [patch.get_label() for patch in lengths.patches] == ["train, 5 rows", "dev, 2 rows", "test, 1 rows"]
    # Four rows of 3 or 4 tokens and one of 5, in bins of one token from 0 on.
    assert lengths.patches[0].get_data().values.tolist() == [0, 0, 0, 40, 40, 20]


def test_every_bin_of_the_picture_holds_as_many_lengths(folder: Path, tokenizer: Tokenizer) -> None:
    description = replace(describe_folder(folder, tokenizer)[0], lengths=np.repeat(np.arange(1, 100), 2))
    (patch,) = draw([description]).figure.axes[-1].patches
    shares = patch.get_data().values
    assert len(shares) <= 40 and np.allclose(shares[1:-1], shares[1]) and shares.sum() == pytest.approx(100)


def run(arguments: list[str], capsys: Capture) -> tuple[int, str, str]:
    status = data_report.main(arguments)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("PDF", b"%PDF")])
def test_the_command_prints_and_draws(ending: str, start: bytes, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    picture = tmp_path / f"new.{ending}"
    status, out, _ = run([str(folder), "--plot", str(picture)], capsys)
    assert status == 0 and f"picture: {picture}" in out
    assert picture.read_bytes().startswith(start)
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["absent"], "error: absent: no such directory"),
        (["{empty}"], "no data file, expected such as ids-sst-train.csv"),
        (["{folder}", "--plot", "{folder}/ids-sst-dev.csv"], "expected a file name that ends in .png or .pdf or .svg"),
        (["{folder}", "--plot", "{broken}/old.png"], "exists already"),
        (["{folder}", "--plot", "{folder}/no/new.png"], "no directory"),
        (["{broken}"], "ids-sst-dev.csv:2: sentiment is '7'"),
        (
            ["{folder}", "--task_file", "{broken}/own.toml"],
            "nope/own-train.csv: No such file or directory, expected the",
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], expected: str, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    write(tmp_path / "broken" / "ids-sst-dev.csv", "id\tsentence\tsentiment", [("a", "7")])
    (tmp_path / "broken" / "old.png").write_text("precious")
    (tmp_path / "broken" / "own.toml").write_text(OWN_TASK)
    places = {"folder": folder, "empty": tmp_path / "empty", "broken": tmp_path / "broken"}
    with mock.patch.dict(TASKS):
        status, out, err = run([argument.format(**places) for argument in arguments], capsys)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_every_task_file_counts_however_they_are_given(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    paths = []
    for name in ("one", "two", "three"):
        write(folder / f"{name}.tsv", "id\ttext\tlabel", [("a", "1")])
        paths.append(tmp_path / f"{name}.toml")
        files = f'folder = "{folder}"\nfiles = {{ train = "{name}.tsv", dev = "{name}.tsv" }}\n'
        paths[-1].write_text(f'[{name}]\n{files}texts = ["text"]\nlabel = "label"\nkind = "binary"\n')
    with mock.patch.dict(TASKS):
        flags = [f"--task_file={paths[0]}", "--task_file", *map(str, paths[1:])]
        status, out, err = run([str(folder), *flags], capsys)
    assert (status, err) == (0, "") and all(f"{path.stem}.tsv" in out for path in paths)


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(
    folder: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", output)
        status = data_report.main([str(folder)])
    assert (status, capsys.readouterr().err) == (0, "")


def test_a_wrong_flag_is_one_short_line(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        data_report.main(["sample", f"--\x1b[2J{'x' * 10**5}"])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith(r"error: unrecognized arguments: --\x1b[2Jxxx")
    assert line.count("\n") == 1 and line[:-1].isprintable() and len(line) < 1100
