"""Rows of tab-separated files: whatever csv writes is read back, and a quote that is never closed is found."""

import csv
import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import find_checkpoint
from datasets import DataError, Tokenizer, parse_examples
from eda import EDITS, EdaConfig, edited_text
from tasks import TASKS
from tsv import has_swallowed_rows, numbered_rows

PATH = Path("rows.csv")


def as_csv(rows: Sequence[Sequence[str]]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream, delimiter="\t", lineterminator="\n").writerows(rows)
    return stream.getvalue().encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("column", [0, 1, 2])
@pytest.mark.parametrize("num_swallowed", [1, 2, 5])
def test_a_quote_that_is_never_closed_is_found_where_a_later_quote_ends_it(column: int, num_swallowed: int) -> None:
    rows = [[f"{i}", f"id{i}", f"text {i}", "1"] for i in range(num_swallowed + 3)]
    rows[0][column] = '"' + rows[0][column]
    rows[num_swallowed][max(column, 1)] += '"'  # a stray quote that ends the open cell as if it were its own
    content = "\n".join("\t".join(row) for row in rows).encode()
    with pytest.raises(DataError, match=r"rows\.csv:1: .*closing quote"):
        list(numbered_rows(PATH, content, DataError))


def test_a_quote_that_is_open_at_the_end_is_found_and_a_text_with_tabs_and_line_ends_is_none() -> None:
    with pytest.raises(DataError, match=r"rows\.csv:2: .*closing quote"):
        list(numbered_rows(PATH, b'id\ttext\n0\t"open\n1\tnext\n2\tlast\n', DataError))
    cells = ["0", "id", "one\ttwo\t\t\nthree\tfour\n", "1"]
    assert not has_swallowed_rows(cells)
    assert list(numbered_rows(PATH, as_csv([cells]), DataError)) == [(1, cells)]


def test_carriage_returns_stay_in_cells_and_end_lines_with_or_without_line_feeds() -> None:
    expected = [(1, ["id", "text"]), (2, ["0", "one\rtwo"]), (3, ["1", "\r"])]
    content = b"id\ttext\n0\tone\rtwo\n1\t\r\n"
    assert list(numbered_rows(PATH, content.replace(b"\t\r\n", b'\t"\r"\n'), DataError)) == expected
    windows = b"id\ttext\r\n0\tone\rtwo\r\n"
    assert list(numbered_rows(PATH, windows, DataError)) == expected[:2]
    assert list(numbered_rows(PATH, b"id\ttext\r0\tone\r", DataError)) == [expected[0], (2, ["0", "one"])]


# -------------------------------------------------------------------------------------------------- any text

SNIPPETS = st.lists(st.text(max_size=12), min_size=8, max_size=8)
SPECIALS = [
    "", " ", '"', '""', '"quoted"', "'", "\t", "\n", "\r", "\r\n", "\x00", "\x07", "\x0b", "\x0c", "\x1c", "\x85",
    "\u2028", "\u200b", "\u200f", "\ufeff", "\u0301", "שלום עולם", "مرحبا", "\u202eabc\u202c", "😀👨‍👩‍👧‍👦🇨🇭",
    "北京", "ﷺ", "1234", "3.5", "...", "good film", "not", "the", "Don't", "\ud7ff", "\U0010ffff", "[SEP]",
    "[CLS]", "##ing",
]  # fmt: skip


def random_text(random: random.Random, snippets: Sequence[str]) -> str:
    """Up to nine pieces, mostly with spaces between; one in 500 is a word of 10,000 characters."""
    if random.random() < 0.002:
        return random.choice(["x", "é", "北", "😀", "\u0301"]) * 10_000
    pieces = random.choices([*SPECIALS, *snippets], k=random.randrange(10))
    return random.choice([" ", " ", ""]).join(pieces)


def synonyms(word: str) -> list[str]:
    return [f"{word}ish", "two words"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(find_checkpoint("minilm"), 64)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(SNIPPETS, st.integers(0, 2**32))
def test_random_rows_go_through_reader_augmentation_and_tokenizer(
    tokenizer: Tokenizer, snippets: list[str], seed: int
) -> None:
    source, config = random.Random(seed), EdaConfig()
    rows = [[str(i), f"id{i}", random_text(source, snippets), random_text(source, snippets), "1"] for i in range(500)]
    rows = [row if not has_swallowed_rows(row) else [part.replace("\n", " ") for part in row] for row in rows]
    task = TASKS["para"]
    content = as_csv([["", "id", *task.text_columns, task.label_column], *rows])
    examples = parse_examples(PATH, content, task, labelled=True).examples
    assert [example.texts for example in examples] == [(row[2], row[3]) for row in rows]
    edited = []
    for example in examples:
        edit = EDITS[source.choice(list(EDITS))]
        texts = tuple(edited_text(text, edit, source, config, synonyms) for text in example.texts)
        assert [bool(text.split()) for text in texts] == [bool(text.split()) for text in example.texts]
        edited.append(texts)
    special = tokenizer.special_ids()
    for texts in ([example.texts for example in examples], edited):
        tokens = tokenizer.encode(texts)
        assert len(tokens) == len(rows) and tokens.lengths.sum() == len(tokens.ids)
        assert ((tokens.lengths >= 3) & (tokens.lengths <= 64)).all()
        ends = np.cumsum(tokens.lengths) - 1
        assert (tokens.ids[ends] == special["SEP"]).all()
        assert (tokens.ids[ends - tokens.lengths + 1] == special["CLS"]).all()
