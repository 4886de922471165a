"""Tokenized files from the cache are those that the csv files give, whatever has become of the cache."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import token_cache
from datasets import DataError, Tokenizer, read_examples
from tasks import TASKS
from token_cache import TokenCache, TokenFile, tokenize_file

SST, PARA = TASKS["sst"], TASKS["para"]
CPU = torch.device("cpu")
ROWS = "\tid\tsentence\tsentiment\n0\ta\tgood film\t3\n1\tb\tno label\t\n2\tc\tbad film film\t0\n"


def tokenizer(folder: Path, words: str = "good bad film", max_length: int = 16) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()]) + "\n")
    return Tokenizer(folder, max_length)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "rows.csv").write_text(ROWS)
    return tmp_path / "rows.csv"


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return TokenCache(tmp_path / "cache", tokenizer(tmp_path / "words"), pytest.fail)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The csv files that were parsed."""
    parsed: list[Path] = []
    original = token_cache.parse_examples

    def counted(path: Path, *rest: object) -> object:
        parsed.append(path)
        return original(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(token_cache, "parse_examples", counted)
    return parsed


def assert_equal(found: TokenFile, expected: TokenFile) -> None:
    assert (found.skipped, found.sha256, found.rows.ids) == (expected.skipped, expected.sha256, expected.rows.ids)
    assert found.rows.task is expected.rows.task
    pairs = [(found.text_hashes, expected.text_hashes), (found.rows.labels, expected.rows.labels)]
    pairs += [(getattr(found.rows.tokens, name), getattr(expected.rows.tokens, name)) for name in _COLUMNS]
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


_COLUMNS = ("ids", "lengths", "firsts")


def test_a_second_load_parses_nothing_and_gives_the_same(path: Path, cache: TokenCache, reading: list[Path]) -> None:
    expected = tokenize_file(read_examples(path, SST, True), SST, cache.tokenizer, CPU)
    assert_equal(cache.load(path, SST, True, CPU), expected)
    assert reading == [path]
    assert_equal(cache.load(path, SST, True, CPU), expected)
    assert reading == [path]
    assert expected.skipped == (3,)


def test_files_without_labels_are_cached_too(path: Path, cache: TokenCache, reading: list[Path]) -> None:
    first, second = (cache.load(path, SST, False, CPU) for _ in range(2))
    assert_equal(second, first)
    assert len(reading) == 1
    assert np.isnan(second.rows.labels).all() and len(second.rows) == 3


@pytest.mark.parametrize("what", ["content", "vocabulary", "length", "labels", "task"])
def test_whatever_the_tokens_follow_from_makes_another_entry(
    what: str, path: Path, cache: TokenCache, reading: list[Path], tmp_path: Path
) -> None:
    cache.load(path, SST, True, CPU)
    task, labelled, other = SST, True, cache
    if what == "content":
        path.write_text(ROWS.replace("good", "bad"))
    elif what == "vocabulary":
        other = TokenCache(cache.folder, tokenizer(tmp_path / "others", "film good bad"), pytest.fail)
    elif what == "length":
        other = TokenCache(cache.folder, tokenizer(tmp_path / "shorter", max_length=4), pytest.fail)
    elif what == "labels":
        labelled = False
    else:
        path.write_text(ROWS.replace("sentence", "sentence1\tsentence2").replace("film\t", "film\tb\t"))
        path.write_text("id\tsentence\tsentence1\tsentence2\tsentiment\tis_duplicate\na\tgood\tbad\tfilm\t1\t1\n")
        cache.load(path, SST, True, CPU)
        task = PARA
    num_parsed = len(reading)
    found = other.load(path, task, labelled, CPU)
    assert len(reading) == num_parsed + 1
    file = read_examples(path, task, labelled)
    assert_equal(found, tokenize_file(file, task, other.tokenizer, CPU))


def cut(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-7])


def flip(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    content[-3] ^= 1
    entry.write_bytes(bytes(content))


def of_another(entry: Path) -> None:
    head, _, payload = entry.read_bytes().partition(b"\n")
    entry.write_bytes(head.replace(head.split()[3], b"0" * 64) + b"\n" + payload)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": cut,
    "one bit": flip,
    "empty": lambda entry: entry.write_bytes(b""),
    "foreign": lambda entry: entry.write_text(json.dumps({"ids": [1, 2]})),
    "another version": lambda entry: entry.write_bytes(entry.read_bytes().replace(b"tokens 1", b"tokens 0", 1)),
    "another key": of_another,
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


def test_a_cache_that_cannot_be_written_is_told_and_does_no_harm(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    lines: list[str] = []
    cache = TokenCache(tmp_path / "file" / "cache", tokenizer(tmp_path / "words"), lines.append)
    assert len(cache.load(path, SST, True, CPU).rows) == 2
    assert any("nothing can be written" in line for line in lines)


def test_a_failed_write_leaves_nothing_behind(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    cache = TokenCache(tmp_path / "cache", tokenizer(tmp_path / "words"), lines.append)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert len(cache.load(path, SST, True, CPU).rows) == 2
    assert list(cache.folder.iterdir()) == []
    assert "No space left" in lines[0]


def test_a_bad_file_is_an_error_and_no_entry(path: Path, cache: TokenCache) -> None:
    path.write_text(ROWS + "3\td\tfilm\t9\n")
    with pytest.raises(DataError, match=r"rows\.csv:5: sentiment is '9'"):
        cache.load(path, SST, True, CPU)
    assert not cache.folder.exists()
