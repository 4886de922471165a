"""Reading files, tokenizing as transformers does, packing rows, and the order in which rows are drawn."""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bert import CheckpointError
from checkpoints import find_checkpoint
from datasets import (
    SAMPLE,
    DataError,
    DataFile,
    DeferredRows,
    Example,
    FeatureRows,
    RowStream,
    TokenizedRows,
    Tokenizer,
    data_folder,
    longest_cut,
    read_examples,
    text_hashes,
    tokenize,
    truncate,
)
from helpers import SPECIALS, THREE, write_vocabulary
from tasks import SPLITS, TASKS, Task

SST, PARA, STS = TASKS["sst"], TASKS["para"], TASKS["sts"]
CPU = torch.device("cpu")
HEADER = "\tid\tsentence\tsentiment\n"

TEXTS = [
    "A plain sentence, with a comma.",
    "Don't   stop!  Ünïcödé naïve café — “quotes” … 北京 ２０24",
    "",
    "   ",
    "unaffable supercalifragilisticexpialidocious antidisestablishmentarianism",
    "ALL CAPS and MiXeD CaSe",
    "the " * 50,
    "0 1 2 3 4 5 6 7 8 9 10 100 1000",
    "tab\tand\nline end \U0001f600 \x07 control",
    "short",
]


def written(folder: Path, content: str | bytes, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def sentences(file: DataFile) -> list[str]:
    return [example.texts[0] for example in file.examples]


def read(folder: Path, content: str | bytes, task: Task = SST) -> DataFile:
    return read_examples(written(folder, content), task, labelled=True)


def test_columns_are_found_by_name_beside_columns_without_one(tmp_path: Path) -> None:
    content = "\tsimilarity\t\tsentence2\tid\t sentence1 \n0\t4.5\tx\tsecond\tid7\tfirst\n1\t0\ty\tB\tid8\tA\n"
    file = read(tmp_path, content, STS)
    found = [(e.id, e.texts, e.label, e.line) for e in file.examples]
    assert found == [("id7", ("first", "second"), 4.5, 2), ("id8", ("A", "B"), 0.0, 3)] and file.skipped == ()


def test_a_file_without_labels_gives_nan_and_one_with_empty_labels_skips_the_rows(tmp_path: Path) -> None:
    test_file = read_examples(written(tmp_path, "id\tsentence\n1\tone\n2\ttwo\n"), SST, labelled=False)
    assert sentences(test_file) == ["one", "two"] and all(np.isnan(e.label) for e in test_file.examples)
    file = read(tmp_path, HEADER + "0\ta\tone\t\n1\tb\ttwo\t4\n2\tc\tthree\t \n3\td\tfour\t0.0\n")
    assert sentences(file) == ["two", "four"] and [e.label for e in file.examples] == [4, 0]
    assert file.skipped == (2, 4)


def test_line_numbers_count_the_lines_of_quoted_cells(tmp_path: Path) -> None:
    content = HEADER + '0\ta\t"two\nlines"\t1\n\n1\tb\tempty\t\n2\tc\tlast\t2\n'
    file = read(tmp_path, content)
    assert [(e.texts[0], e.line) for e in file.examples] == [("two\nlines", 2), ("last", 6)]
    assert file.skipped == (5,)
    with pytest.raises(DataError, match=r"rows\.csv:7: sentiment is '9'"):
        read(tmp_path, content + "3\td\tbad\t9\n")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_quotes_tabs_and_line_ends_are_read_as_csv_writes_them(ending: str, tmp_path: Path) -> None:
    texts = ['He said "no".', '"all quoted"', "a\ttab", "a line\nend", '"', "it's", 'odd " one', "comma, semi; colon"]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator=ending)
    writer.writerow(["", "id", "sentence", "sentiment"])
    writer.writerows(["", f"id{i}", text, i % 5] for i, text in enumerate(texts))
    file = read(tmp_path, stream.getvalue())
    assert sentences(file) == texts
    assert [e.label for e in file.examples] == [i % 5 for i in range(len(texts))]


@pytest.mark.parametrize("mark", ['say "yes" or "no"', *"\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"])
def test_quotes_and_other_line_separators_within_an_unquoted_cell_stay(mark: str, tmp_path: Path) -> None:
    file = read(tmp_path, f"{HEADER}0\ta\tone{mark}two\t1\n1\tb\tthree\t2\n")
    assert [(e.texts[0], e.line) for e in file.examples] == [(f"one{mark}two", 2), ("three", 3)]


def test_a_byte_order_mark_and_a_missing_last_line_end_do_not_matter(tmp_path: Path) -> None:
    content = "id\tsentence\tsentiment\n1\tone\t1\n2\ttwo\t2"
    plain, marked = read(tmp_path, content), read(tmp_path, "\ufeff" + content + "\n")
    assert plain.examples == marked.examples and len(plain.examples) == 2 and plain.sha256 != marked.sha256


PAIR = "id\tsentence1\tsentence2\t"
QUOTED = ": a quoted cell runs over 2 lines, expected a closing quote"
BAD_FILES: list[tuple[str | bytes, str, Task]] = [
    ("", ": the file is empty, expected a header line and rows", SST),
    (HEADER, ": no rows below the header, expected at least one", SST),
    (HEADER + "0\ta\tone\t\n", ": no rows with a label below the header, expected at least one", SST),
    ("id,sentence,sentiment\na,one,1\n", ":1: no tab in the header 'id,sentence,sentiment', expected tab", SST),
    ("id\tsentence\na\tone\n", ":1: no column 'sentiment', found 'id', 'sentence'; expected id,", SST),
    ("id\ttext\tsentiment\na\tone\t1\n", ":1: no column 'sentence', found 'id', 'text', 'sentiment'; expected id", SST),
    (HEADER.encode() + b"0\ta\tone\t1\n1\tb\tcaf\xe9 noir\t2\n", ":3: byte 0xe9 is not valid UTF-8", SST),
    (HEADER + "0\ta\tone\t1\n1\tb\ttwo\n", ":3: 3 columns, expected 4 as in the header", SST),
    (HEADER + "0\ta\tone\tmore\t1\n", ":2: 5 columns, expected 4 as in the header", SST),
    (HEADER + '0\ta\tone\t1\n1\tb\t"two\t2\n2\tc\tthree\t3\n', f":3{QUOTED}", SST),
    (HEADER + '0\ta\t"one\t1\n1\tb\ttwo\t2\n2\tc\t"three"\t3\n', ":2: a quoted cell runs over 3 lines, expected", SST),
    (HEADER + "0\ta\tone\t1\n1\tb\ttwo\t5\n", ":3: sentiment is '5', expected a whole number from 0 to 4", SST),
    (f"{PAIR}similarity\na\tA\tB\tnan\n", ":2: similarity is 'nan', expected a number from 0 to 5", STS),
    (f"{PAIR}is_duplicate\na\tA\tB\t2\n", ":2: is_duplicate is '2', expected 0 or 1", PARA),
]


@pytest.mark.parametrize(("content", "message", "task"), BAD_FILES)
def test_a_bad_file_is_one_line_with_file_and_line(
    content: str | bytes, message: str, task: Task, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, content, task)
    assert str(error.value).startswith(f"{tmp_path / 'rows.csv'}{message}") and "\n" not in str(error.value)


def test_rows_that_cannot_be_used_are_named_together_up_to_a_number(tmp_path: Path) -> None:
    for num_bad, more in ((2, []), (7, ["2 more rows"]), (6, ["1 more row"])):
        content = "id\tsentence\tsentiment\n" + "".join(f"{i}\ttext\t{9 if i < num_bad else 0}\n" for i in range(8))
        with pytest.raises(DataError) as error:
            read(tmp_path, content, SST)
        named = [
            f"{tmp_path / 'rows.csv'}:{i + 2}: sentiment is '9', expected a whole number from 0 to 4"
            for i in range(min(num_bad, 5))
        ]
        assert list(error.value.args) == named + [f"{tmp_path / 'rows.csv'}: {of} that cannot be used" for of in more]


def test_a_missing_file_and_a_missing_directory_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.csv", tmp_path):
        with pytest.raises(DataError) as error:
            read_examples(path, PARA, labelled=True)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
        assert "expected the Quora paraphrase rows" in str(error.value)
    assert (data_folder(str(tmp_path)), data_folder("sample")) == (tmp_path, SAMPLE)
    with pytest.raises(DataError, match=r"--data .*absent: no such directory; expected 'sample' or a directory"):
        data_folder(str(tmp_path / "absent"))


@pytest.mark.parametrize("task", THREE)
@pytest.mark.parametrize("split", SPLITS)
def test_every_row_of_the_sample_is_read(task: str, split: str) -> None:
    path = SAMPLE / TASKS[task].file_name(split)
    file = read_examples(path, TASKS[task], labelled=split != "test")
    assert len(file.examples) + len(file.skipped) == path.read_bytes().count(b"\n") - 1
    assert all(text.strip() for example in file.examples for text in example.texts)
    assert all(np.isnan(e.label) == (split == "test") for e in file.examples)


@pytest.fixture(scope="module")
def embedded() -> Path:
    return find_checkpoint("minilm")


def tiny_vocabulary(folder: Path, lower: bool) -> Path:
    write_vocabulary(folder, ("Hello", "hello", "World", "caf", "##é", "cafe"))
    settings = {"do_lower_case": lower, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def encoded(tokenizer: Tokenizer, rows: Sequence[tuple[str, ...]]) -> list[tuple[list[int], list[int]]]:
    """(ids, token types) of each row, as a batch holds them."""
    tokens = tokenizer.encode(rows)
    data = TokenizedRows(SST, [""] * len(rows), np.zeros(len(rows), np.float32), tokens, CPU)
    packed = data.batch(range(len(rows))).tokens
    assert packed is not None
    lengths = tokens.lengths.tolist()
    ids, types = (part[: sum(lengths)].split(lengths) for part in (packed.input_ids, packed.token_type_ids))
    return [(i.tolist(), t.tolist()) for i, t in zip(ids, types, strict=True)]


@pytest.mark.parametrize("max_length", [9, 23, 65, 257])
def test_token_ids_and_types_equal_those_of_transformers(max_length: int, embedded: Path) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(embedded)
    tokenizer = Tokenizer(embedded, max_length)
    both: list[tuple[str, ...]] = [(a, b) for a in TEXTS for b in TEXTS]
    for rows in (both, [(text,) for text in TEXTS]):
        texts = [list(column) for column in zip(*rows, strict=True)]
        expected = reference(*texts, truncation="longest_first", max_length=max_length)
        assert encoded(tokenizer, rows) == list(zip(expected["input_ids"], expected["token_type_ids"], strict=True))
        lengths = tokenizer.encode(rows).lengths
        assert lengths.max() <= max_length and lengths.min() == len(rows[0]) + 1


def test_a_pair_is_cls_a_sep_b_sep_with_types_0_and_1(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_vocabulary(tmp_path, lower=False), 32)
    cls, sep, hello, world = SPECIALS.index("[CLS]"), SPECIALS.index("[SEP]"), 6, 7
    assert encoded(tokenizer, [("hello", "World hello")]) == [
        ([cls, hello, sep, world, hello, sep], [0, 0, 0, 1, 1, 1])
    ]
    assert encoded(tokenizer, [("hello World",)]) == [([cls, hello, world, sep], [0] * 4)]
    assert encoded(tokenizer, [("", "")]) == [([cls, sep, sep], [0, 0, 1])]


@pytest.mark.parametrize("lower", [True, False])
def test_lower_casing_is_the_tokenizer_s(lower: bool, tmp_path: Path) -> None:
    folder = tiny_vocabulary(tmp_path, lower)
    reference = transformers.BertTokenizer.from_pretrained(folder, do_lower_case=lower)
    texts = ["Hello hello World", "Café café"]
    ids = [row for row, _ in encoded(Tokenizer(folder, 32), [(text,) for text in texts])]
    assert ids == reference(texts)["input_ids"]
    assert ids[0][1:-1] == ([6, 6, 1] if lower else [5, 6, 7])
    assert ids[1][1:-1] == ([10, 10] if lower else [1, 8, 9])


def test_tokenizer_json_comes_before_vocab_txt_and_its_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    cased = transformers.BertTokenizer.from_pretrained(tiny_vocabulary(tmp_path / "cased", False), do_lower_case=False)
    tokenizer = cased._tokenizer
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    folder = tiny_vocabulary(tmp_path, lower=True)
    found = encoded(Tokenizer(folder, 32), [("Hello World Hello World",), ("Hello",)])
    assert [ids[1:-1] for ids, _ in found] == [[5, 7, 5, 7], [5]]


def longest_first(lengths: list[int], budget: int) -> list[int]:
    """The definition, a token at a time: from the longer side, from the second of two equal ones."""
    lengths = list(lengths)
    while sum(lengths) > budget:
        longest = max(lengths)
        lengths[max(i for i, length in enumerate(lengths) if length == longest)] -= 1
    return lengths


def test_truncation_takes_tokens_from_the_longer_side_one_at_a_time() -> None:
    random = np.random.default_rng(0)
    cases = [[0, 0], [5, 5], [0, 30], [30, 0], [20, 21], [40], *random.integers(0, 40, (300, 2)).tolist()]
    for lengths in cases:
        texts = [list(range(100 * i, 100 * i + length)) for i, length in enumerate(lengths)]
        for budget in (0, 1, 7, 20, 21, 80):
            cut = truncate(texts, budget)
            assert [len(text) for text in cut] == longest_first(lengths, budget)
            assert all(text == whole[: len(text)] for text, whole in zip(cut, texts, strict=True))


def test_a_fingerprint_changes_with_length_and_vocabulary(tmp_path: Path) -> None:
    first = tiny_vocabulary(tmp_path / "first", lower=True)
    cased = tiny_vocabulary(tmp_path / "cased", lower=False)
    prints = [Tokenizer(first, 16), Tokenizer(first, 17), Tokenizer(cased, 16), Tokenizer(first, 16)]
    a, b, c, again = [tokenizer.fingerprint() for tokenizer in prints]
    assert len({a, b, c}) == 3 and again == a


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer, expected tokenizer.json, vocab.txt or vocab.json, merges.txt"),
        ({"vocab.json": "{", "merges.txt": ""}, "vocab.json, merges.txt: not readable as a tokenizer"),
        (
            {"vocab.txt": "\n".join(SPECIALS), "tokenizer_config.json": '{"cls_token": "<s>"}'},
            "the tokenizer has no token <s>, expected that of a BERT",
        ),
        ({"vocab.txt": "\n".join(SPECIALS), "tokenizer.json": "{"}, "tokenizer.json: not readable as a tokenizer"),
        ({"vocab.txt": "\n".join([*SPECIALS, "caf\xe9"])}, "vocab.txt, tokenizer_config.json: not readable as a t"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_one_line(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Tokenizer(tmp_path, 16)


@pytest.fixture
def pairs(tmp_path: Path) -> TokenizedRows:
    """Three rows of 6, 7 and 5 tokens."""
    rows = "x\thello\tWorld hello\t1.5\ny\tHello World caf\tWorld\t2\nz\tcafe\tcafe\t5\n"
    examples = read(tmp_path, f"{PAIR}similarity\n{rows}", STS).examples
    return tokenize(STS, examples, Tokenizer(tiny_vocabulary(tmp_path / "words", lower=False), 32), CPU)


def content(rows: TokenizedRows) -> list[object]:
    tokens = rows.batch(range(len(rows))).tokens
    assert tokens is not None
    return [rows.ids, rows.labels.tolist(), tokens.input_ids.tolist(), tokens.token_type_ids.tolist()]


def test_a_batch_holds_the_rows_asked_for_in_that_order(pairs: TokenizedRows) -> None:
    batch = pairs.batch([2, 0])
    assert batch.tokens is not None and len(batch) == 2
    assert batch.labels.tolist() == [5.0, 1.5] and batch.labels.dtype == torch.float32
    assert batch.tokens.input_ids[:11].tolist() == [2, 10, 3, 10, 3, 2, 6, 3, 7, 6, 3]
    assert batch.tokens.token_type_ids[:11].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert batch.tokens.position_ids[:11].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    assert batch.tokens.first_tokens.tolist() == [0, 5] and batch.tokens.packing.num_tokens == 11
    assert batch.tokens.row_of_token[:11].tolist() == [0] * 5 + [1] * 6 and batch.tokens.row_of_token[11:].eq(2).all()
    assert pairs.by_length().tolist() == [1, 0, 2]  # the longest first


def test_siamese_pairs_are_two_sequences_each_from_position_0_of_type_0_and_cut_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_vocabulary(tmp_path, lower=False), 5, is_siamese=True)
    texts = [("hello", "World hello World World"), ("hello hello hello hello hello", ""), ("cafe", "cafe")]
    data = tokenize(STS, [Example(str(i), row, 0.5 * i, i) for i, row in enumerate(texts)], tokenizer, CPU)
    assert data.tokens.lengths.tolist() == [8, 7, 6] and data.by_length().tolist() == [0, 1, 2]
    sequences = [[2, 6, 3], [2, 7, 6, 7, 3], [2, 6, 6, 6, 3], [2, 3], [2, 10, 3], [2, 10, 3]]
    joined = data.select(np.array([2])).followed_by(data.select(np.array([0, 1])))
    for rows, order in ((data, [1, 0, 2]), (data, [2]), (joined, [2, 1, 0])):
        batch, names = rows.batch(order), [int(rows.ids[row]) for row in order]
        expected = [sequence for name in names for sequence in sequences[2 * name : 2 * name + 2]]
        tokens, sizes = batch.tokens, [len(sequence) for sequence in expected]
        assert tokens is not None and tokens.packing.lengths.tolist() == sizes and tokens.packing.longest == 5
        ids, positions = (part.tolist()[: sum(sizes)] for part in (tokens.input_ids, tokens.position_ids))
        assert ids == [i for sequence in expected for i in sequence]
        assert positions == [i for size in sizes for i in range(size)]
        assert not tokens.token_type_ids.any() and not tokens.position_ids[sum(sizes) :].any()
        assert tokens.first_tokens.tolist() == [i for i, position in enumerate(positions) if position == 0]
        of_rows = [number // 2 for number, size in enumerate(sizes) for _ in range(size)]
        assert tokens.row_of_token[: sum(sizes)].tolist() == of_rows
        assert tokens.row_of_token[sum(sizes) :].eq(len(order)).all()
        assert batch.labels.tolist() == [0.5 * name for name in names]
    alone = data.by_sequence().batch(range(6)).tokens
    assert alone is not None and alone.packing.lengths.tolist() == [len(sequence) for sequence in sequences]
    assert alone.input_ids[:21].tolist() == [i for sequence in sequences for i in sequence]
    assert alone.row_of_token[:3].tolist() == [0] * 3 and len(alone) == 6
    assert encoded(tokenizer, [("hello World",)]) == encoded(Tokenizer(tmp_path, 5), [("hello World",)])


def test_selected_and_joined_rows_are_the_same_rows(pairs: TokenizedRows) -> None:
    chosen = pairs.select(np.array([1, 0]))
    assert chosen.ids == ["y", "x"] and chosen.labels.tolist() == [2.0, 1.5] and len(chosen) == 2
    joined = chosen.followed_by(pairs.select(np.array([2])))
    assert content(joined) == content(pairs.select(np.array([1, 0, 2])))
    assert content(joined.select(np.array([1, 0, 2]))) == content(pairs)


def test_feature_rows_give_what_is_asked_for_and_deferred_ones_are_made_once_when_it_is() -> None:
    features, labels, made = torch.arange(12.0).view(4, 3), np.arange(4, dtype=np.float32), list[bool]()

    def make() -> FeatureRows:
        made.append(True)
        return FeatureRows(features, labels)

    deferred = DeferredRows(labels, make)
    assert len(deferred) == 4 and not made
    for data in (make(), deferred, deferred):
        batch = data.batch(np.array([3, 1]))
        assert batch.tokens is None and batch.features is not None and torch.equal(batch.features, features[[3, 1]])
        assert batch.labels.tolist() == [3, 1]
        assert len(data) == 4 and data.by_length().tolist() == [0, 1, 2, 3]
    assert len(made) == 2


def test_features_that_are_constant_but_for_rounding_are_left_at_their_scale() -> None:
    """In units of its deviation such a feature would be noise as loud as the others, and explode when it moves."""
    features = torch.tensor([[1.0, 3.0, 5.0], [2.0, 3.0, 5.000001], [4.0, 3.0, 5.0]])
    mean, deviation = FeatureRows(features, np.zeros(3, np.float32)).moments
    assert deviation.tolist() == pytest.approx([np.std([1, 2, 4]), 1, 1])
    assert mean.tolist() == pytest.approx([7 / 3, 3, 5])


LENGTHS = np.array([5, 9, 3, 9, 7, 9, 1, 2, 4, 6])


@pytest.mark.parametrize(
    ("share", "kept", "cut"),
    [(0.2, [0, 1, 2, 4, 6, 7, 8, 9], 9), (0.35, [0, 2, 4, 6, 7, 8, 9], 7), (0.0, list(range(10)), 9)],
)
def test_the_longest_share_of_the_rows_is_cut_and_later_ones_first(share: float, kept: list[int], cut: int) -> None:
    found, longest = longest_cut(LENGTHS, share)
    assert (found.tolist(), longest) == (kept, cut)


def test_rows_with_the_same_texts_have_the_same_hash() -> None:
    rows = [("A  film", "good"), ("good", "a Film"), ("a film good", ""), ("a", "film good"), ("a film", "bad")]
    hashes = text_hashes([Example("", texts, 0, 0) for texts in rows]).tolist()
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


@pytest.mark.parametrize(("num_rows", "count"), [(10, 3), (12, 4), (5, 8), (1, 1), (7, 21)])
def test_rows_go_on_over_the_end_of_a_pass_and_every_pass_holds_each_row_once(num_rows: int, count: int) -> None:
    stream, drawn = RowStream(num_rows, seed=3), list[int]()
    while len(drawn) < 4 * num_rows:
        rows = stream.rows(len(drawn), count)
        assert len(rows) == count
        drawn += rows.tolist()
    for first in range(0, 4 * num_rows, num_rows):
        assert sorted(drawn[first : first + num_rows]) == list(range(num_rows))


def test_passes_and_seeds_have_orders_of_their_own_that_follow_from_the_position_and_no_global_generator() -> None:
    orders = {tuple(RowStream(20, seed).rows(20 * number, 20)) for seed in (0, 1) for number in range(15)}
    assert len(orders) == 30 and tuple(range(20)) not in orders
    state = repr(np.random.get_state())
    whole, stream = RowStream(23, seed=9).rows(0, 160), RowStream(23, seed=9)
    for position in np.random.default_rng(0).permutation(150).tolist():
        assert stream.rows(position, 10).tolist() == whole[position : position + 10].tolist()
    assert repr(np.random.get_state()) == state
