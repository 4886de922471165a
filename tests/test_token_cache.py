"""Tokenized files from the cache are those that the csv files give, whatever has become of the cache."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import token_cache
from datasets import DataError, DataFile, Tokenizer, parse_examples, read_examples
from helpers import Patch, write_vocabulary
from tasks import TASKS, Task
from token_cache import TokenCache, TokenFile, tokenize_file

SST, PARA = TASKS["sst"], TASKS["para"]
CPU = torch.device("cpu")
ROWS = "\tid\tsentence\tsentiment\n0\ta\tgood film\t3\n1\tb\tno label\t\n2\tc\tbad film film\t0\n"


def tokenizer(folder: Path, words: str = "good bad film", max_length: int = 16) -> Tokenizer:
    return Tokenizer(write_vocabulary(folder, words.split()), max_length)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "rows.csv").write_text(ROWS)
    return tmp_path / "rows.csv"


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return TokenCache(tmp_path / "cache", tokenizer(tmp_path / "words"), pytest.fail)


@pytest.fixture
def reading(monkeypatch: Patch) -> list[Path]:
    """The csv files that were parsed."""
    parsed: list[Path] = []

    def counted(path: Path, content: bytes, task: Task, labelled: bool) -> DataFile:
        parsed.append(path)
        return parse_examples(path, content, task, labelled)

    monkeypatch.setattr(token_cache, "parse_examples", counted)
    return parsed


def assert_equal(found: TokenFile, expected: TokenFile) -> None:
    assert (found.skipped, found.sha256, found.rows.ids) == (expected.skipped, expected.sha256, expected.rows.ids)
    assert found.rows.task is expected.rows.task
    arrays = [[file.text_hashes, file.rows.labels, *vars(file.rows.tokens).values()] for file in (found, expected)]
    for ours, theirs in zip(*(map(np.asarray, of) for of in arrays), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("labelled", "skipped"), [(True, (3,)), (False, ())])
def test_a_second_load_parses_nothing_and_gives_the_same(
    labelled: bool, skipped: tuple[int, ...], path: Path, cache: TokenCache, reading: list[Path]
) -> None:
    expected = tokenize_file(read_examples(path, SST, labelled), SST, cache.tokenizer, CPU)
    for _ in range(2):
        found = cache.load(path, SST, labelled, CPU)
        assert_equal(found, expected)
        assert reading == [path] and found.skipped == skipped and np.isnan(found.rows.labels).all() != labelled


@pytest.mark.parametrize("what", ["content", "vocabulary", "length", "labels", "task", "pairs"])
def test_whatever_the_tokens_follow_from_makes_another_entry(
    what: str, path: Path, cache: TokenCache, reading: list[Path], tmp_path: Path
) -> None:
    if what in ("task", "pairs"):
        path.write_text("id\tsentence\tsentence1\tsentence2\tsentiment\tis_duplicate\na\tgood\tbad\tfilm\t1\t1\n")
    task, labelled, words = PARA if what in ("task", "pairs") else SST, what != "labels", cache.tokenizer
    cache.load(path, task if what == "pairs" else SST, True, CPU)
    if what == "content":
        path.write_text(ROWS.replace("good", "bad"))
    elif what == "vocabulary":
        words = tokenizer(tmp_path / "others", "film good bad")
    elif what == "length":
        words = tokenizer(tmp_path / "shorter", max_length=4)
    elif what == "pairs":
        words = Tokenizer(tmp_path / "words", 16, is_siamese=True)
    cache = TokenCache(cache.folder, words, pytest.fail)
    found = cache.load(path, task, labelled, CPU)
    assert len(reading) == 2
    assert_equal(cache.load(path, task, labelled, CPU), found)
    assert len(reading) == 2
    assert_equal(found, tokenize_file(read_examples(path, task, labelled), task, words, CPU))


def replaced(old: bytes, new: bytes) -> Callable[[Path], object]:
    return lambda entry: entry.write_bytes(entry.read_bytes().replace(old, new, 1))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda entry: os.truncate(entry, entry.stat().st_size - 7),
    "one bit": lambda entry: entry.write_bytes((of := entry.read_bytes())[:-3] + bytes([of[-3] ^ 1]) + of[-2:]),
    "empty": lambda entry: entry.write_bytes(b""),
    "foreign": lambda entry: entry.write_text(json.dumps({"ids": [1, 2]})),
    "another version": replaced(b"tokens 2", b"tokens 0"),
    "another key": lambda entry: replaced(entry.read_bytes().split()[3], b"0" * 64)(entry),
    "a folder": lambda entry: (entry.unlink(), entry.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_entry_is_told_and_made_anew(
    damage: str, path: Path, tmp_path: Path, reading: list[Path]
) -> None:
    lines: list[str] = []
    cache = TokenCache(tmp_path / "cache", tokenizer(tmp_path / "words"), lines.append)
    expected = cache.load(path, SST, True, CPU)
    (entry,) = cache.folder.iterdir()
    DAMAGE[damage](entry)
    assert_equal(cache.load(path, SST, True, CPU), expected)
    assert len(reading) == 2 and lines and str(entry) in lines[0]
    if damage != "a folder":
        assert_equal(cache.load(path, SST, True, CPU), expected)
        assert len(reading) == 2 and len(lines) == 1


@pytest.mark.parametrize(("place", "told"), [("file/cache", "Not a directory"), ("cache", "No space left")])
def test_an_entry_that_cannot_be_written_is_told_and_does_no_harm(
    place: str, told: str, path: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "file").write_text("in the way")
    lines: list[str] = []
    cache = TokenCache(tmp_path / place, tokenizer(tmp_path / "words"), lines.append)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert len(cache.load(path, SST, True, CPU).rows) == 2
    assert len(cache.load(path, SST, False, CPU).rows) == 3  # another entry
    assert len(lines) == 1 and told in lines[0] and not list(cache.folder.glob("*"))


def test_a_bad_file_is_an_error_and_no_entry(path: Path, cache: TokenCache) -> None:
    path.write_text(ROWS + "3\td\tfilm\t9\n")
    with pytest.raises(DataError, match=r"rows\.csv:5: sentiment is '9'"):
        cache.load(path, SST, True, CPU)
    assert not cache.folder.exists()
