"""Reading files, tokenizing as transformers does, packing rows, and the order in which rows are drawn."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bert import CheckpointError, find_checkpoint
from datasets import (
    SAMPLE,
    SPLITS,
    DataError,
    DataFile,
    DeferredRows,
    FeatureRows,
    RowStream,
    TokenizedRows,
    Tokenizer,
    data_folder,
    epoch_order,
    longest_cut,
    read_examples,
    tokenize,
    truncate,
)
from tasks import TASKS

SST, PARA, STS = TASKS["sst"], TASKS["para"], TASKS["sts"]
CPU = torch.device("cpu")
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
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


def as_csv(rows: Sequence[Sequence[object]], ending: str = "\n") -> str:
    """Rows as Python's csv module writes them."""
    stream = io.StringIO()
    csv.writer(stream, delimiter="\t", lineterminator=ending).writerows(rows)
    return stream.getvalue()


def sentences(file: DataFile) -> list[str]:
    return [example.texts[0] for example in file.examples]


# ------------------------------------------------------------------------------------------------ reading files


def test_columns_are_found_by_name_beside_columns_without_one(tmp_path: Path) -> None:
    content = "\tsimilarity\t\tsentence2\tid\t sentence1 \n0\t4.5\tx\tsecond\tid7\tfirst\n1\t0\ty\tB\tid8\tA\n"
    file = read_examples(written(tmp_path, content), STS, labelled=True)
    assert [(e.id, e.texts, e.label, e.line) for e in file.examples] == [
        ("id7", ("first", "second"), 4.5, 2),
        ("id8", ("A", "B"), 0.0, 3),
    ]
    assert file.skipped == ()


def test_a_file_without_labels_gives_nan_and_one_with_empty_labels_skips_the_rows(tmp_path: Path) -> None:
    test_file = read_examples(written(tmp_path, "id\tsentence\n1\tone\n2\ttwo\n"), SST, labelled=False)
    assert sentences(test_file) == ["one", "two"] and all(np.isnan(e.label) for e in test_file.examples)
    content = HEADER + "0\ta\tone\t\n1\tb\ttwo\t4\n2\tc\tthree\t \n3\td\tfour\t0.0\n"
    file = read_examples(written(tmp_path, content), SST, labelled=True)
    assert sentences(file) == ["two", "four"] and [e.label for e in file.examples] == [4, 0]
    assert file.skipped == (2, 4)


def test_line_numbers_count_the_lines_of_quoted_cells(tmp_path: Path) -> None:
    content = HEADER + '0\ta\t"two\nlines"\t1\n\n1\tb\tempty\t\n2\tc\tlast\t2\n'
    file = read_examples(written(tmp_path, content), SST, labelled=True)
    assert [(e.texts[0], e.line) for e in file.examples] == [("two\nlines", 2), ("last", 6)]
    assert file.skipped == (5,)
    with pytest.raises(DataError, match=r"rows\.csv:7: sentiment is '9'"):
        read_examples(written(tmp_path, content + "3\td\tbad\t9\n"), SST, labelled=True)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_quotes_tabs_and_line_ends_are_read_as_csv_writes_them(ending: str, tmp_path: Path) -> None:
    texts = ['He said "no".', '"all quoted"', "a\ttab", "a line\nend", '"', "it's", 'odd " one', "comma, semi; colon"]
    rows = [["", "id", "sentence", "sentiment"], *([i, f"id{i}", text, i % 5] for i, text in enumerate(texts))]
    file = read_examples(written(tmp_path, as_csv(rows, ending)), SST, labelled=True)
    assert sentences(file) == texts
    assert [e.label for e in file.examples] == [i % 5 for i in range(len(texts))]


def test_quotes_within_an_unquoted_cell_stay(tmp_path: Path) -> None:
    file = read_examples(written(tmp_path, HEADER + '0\ta\tsay "yes" or "no"\t1\n1\tb\tb\t2\n'), SST, labelled=True)
    assert sentences(file) == ['say "yes" or "no"', "b"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_other_line_separators_do_not_break_a_row(mark: str, tmp_path: Path) -> None:
    file = read_examples(written(tmp_path, f"{HEADER}0\ta\tone{mark}two\t1\n1\tb\tthree\t2\n"), SST, labelled=True)
    assert sentences(file) == [f"one{mark}two", "three"]
    assert [e.line for e in file.examples] == [2, 3]


def test_a_byte_order_mark_and_a_missing_last_line_end_do_not_matter(tmp_path: Path) -> None:
    content = "id\tsentence\tsentiment\n1\tone\t1\n2\ttwo\t2"
    plain = read_examples(written(tmp_path, content), SST, labelled=True)
    marked = read_examples(written(tmp_path, "\ufeff" + content + "\n"), SST, labelled=True)
    assert plain.examples == marked.examples and len(plain.examples) == 2
    assert plain.sha256 != marked.sha256


BAD_FILES = {
    "empty": ("", "{path}: the file is empty, expected a header line and rows"),
    "header only": (HEADER, "{path}: no rows below the header, expected at least one"),
    "no row with a label": (
        HEADER + "0\ta\tone\t\n",
        "{path}: no rows below the header, expected at least one with a label",
    ),
    "commas": (
        "id,sentence,sentiment\na,one,1\n",
        "{path}:1: no tab in the header 'id,sentence,sentiment', expected tab",
    ),
    "missing label column": (
        "id\tsentence\na\tone\n",
        "{path}:1: no column 'sentiment', found 'id', 'sentence'; expected id,",
    ),
    "missing text column": (
        "id\ttext\tsentiment\na\tone\t1\n",
        "{path}:1: no column 'sentence', found 'id', 'text', 'sentiment'; expected id, sentence, sentiment",
    ),
    "invalid UTF-8": (
        HEADER.encode() + b"0\ta\tone\t1\n1\tb\tcaf\xe9 noir\t2\n",
        "{path}:3: byte 0xe9 is not valid UTF-8",
    ),
    "label out of range": (
        HEADER + "0\ta\tone\t1\n1\tb\ttwo\t5\n",
        "{path}:3: sentiment is '5', expected a whole number from",
    ),
    "negative label": (HEADER + "0\ta\tone\t-1\n", "{path}:2: sentiment is '-1', expected a whole number from 0 to 4"),
    "label between classes": (HEADER + "0\ta\tone\t1.5\n", "{path}:2: sentiment is '1.5', expected a whole number"),
    "label not a number": (HEADER + "0\ta\tone\tgood\n", "{path}:2: sentiment is 'good', expected a whole number"),
    "label nan": (HEADER + "0\ta\tone\tnan\n", "{path}:2: sentiment is 'nan', expected a whole number"),
    "too few columns": (HEADER + "0\ta\tone\t1\n1\tb\ttwo\n", "{path}:3: 3 columns, expected 4 as in the header"),
    "too many columns": (HEADER + "0\ta\tone\tmore\t1\n", "{path}:2: 5 columns, expected 4 as in the header"),
    "unclosed quote": (
        HEADER + '0\ta\tone\t1\n1\tb\t"two\t2\n2\tc\tthree\t3\n',
        "{path}:3: a quoted cell runs over 2 lines, expected a closing quote",
    ),
    "unclosed quote met by a later one": (
        HEADER + '0\ta\t"one\t1\n1\tb\ttwo\t2\n2\tc\t"three"\t3\n',
        "{path}:2: a quoted cell runs over 2 lines, expected a closing quote",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_with_file_and_line(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    path = written(tmp_path, content)
    with pytest.raises(DataError) as error:
        read_examples(path, SST, labelled=True)
    assert str(error.value).startswith(message.format(path=path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", ["5.01", "-0.1", "inf", "nan", "high", "1,5"])
def test_a_similarity_that_is_no_number_from_0_to_5_is_refused(label: str, tmp_path: Path) -> None:
    content = f"id\tsentence1\tsentence2\tsimilarity\na\tA\tB\t5\nb\tA\tB\t{label}\n"
    path = written(tmp_path, content)
    with pytest.raises(DataError) as error:
        read_examples(path, STS, labelled=True)
    assert str(error.value) == f"{path}:3: similarity is '{label}', expected a number from 0 to 5"


@pytest.mark.parametrize("label", ["2", "0.5", "-1", "yes"])
def test_a_duplicate_label_other_than_0_and_1_is_refused(label: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"id\tsentence1\tsentence2\tis_duplicate\na\tA\tB\t1.0\nb\tA\tB\t{label}\n")
    with pytest.raises(DataError, match=f":3: is_duplicate is '{label}', expected 0 or 1"):
        read_examples(path, PARA, labelled=True)


def test_a_missing_file_and_a_folder_in_its_place_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.csv", tmp_path):
        with pytest.raises(DataError) as error:
            read_examples(path, PARA, labelled=True)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
        assert "expected the Quora paraphrase rows" in str(error.value)


def test_a_missing_data_directory_is_one_line(tmp_path: Path) -> None:
    assert data_folder(str(tmp_path)) == tmp_path
    assert data_folder("sample") == SAMPLE
    with pytest.raises(DataError, match=r"--data .*absent: no such directory; expected 'sample' or a directory"):
        data_folder(str(tmp_path / "absent"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_row_of_the_sample_is_read(task: str, split: str) -> None:
    path = SAMPLE / TASKS[task].file_name(split)
    file = read_examples(path, TASKS[task], labelled=split != "test")
    assert len(file.examples) + len(file.skipped) == path.read_bytes().count(b"\n") - 1
    assert all(text.strip() for example in file.examples for text in example.texts)
    assert all(np.isnan(e.label) == (split == "test") for e in file.examples)


# --------------------------------------------------------------------------------------------------- tokenizing


@pytest.fixture(scope="module")
def embedded() -> Path:
    return find_checkpoint("minilm")


def tiny_vocabulary(
    folder: Path, lower: bool, words: Sequence[str] = ("Hello", "hello", "World", "caf", "##é", "cafe")
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIALS, *words]) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": lower, "tokenizer_class": "BertTokenizer"})
    )
    return folder


def encoded(tokenizer: Tokenizer, rows: Sequence[tuple[str, ...]]) -> list[tuple[list[int], list[int]]]:
    """(ids, token types) of each row, as a batch holds them."""
    tokens = tokenizer.encode(rows)
    data = TokenizedRows(SST, [""] * len(rows), np.zeros(len(rows), np.float32), tokens, CPU)
    packed = data.batch(range(len(rows))).tokens
    assert packed is not None
    ids, types = (part.split(tokens.lengths.tolist()) for part in (packed.input_ids, packed.token_type_ids))
    return [(i.tolist(), t.tolist()) for i, t in zip(ids, types, strict=True)]


@pytest.mark.parametrize("max_length", [9, 23, 65, 257])
def test_token_ids_and_types_equal_those_of_transformers(max_length: int, embedded: Path) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(embedded)
    tokenizer = Tokenizer(embedded, max_length)
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    settings = {"truncation": "longest_first", "max_length": max_length}
    expected = reference([a for a, _ in pairs], [b for _, b in pairs], **settings)
    wanted = list(zip(expected["input_ids"], expected["token_type_ids"], strict=True))
    assert encoded(tokenizer, pairs) == wanted
    single = reference(TEXTS, **settings)
    wanted = list(zip(single["input_ids"], single["token_type_ids"], strict=True))
    assert encoded(tokenizer, [(text,) for text in TEXTS]) == wanted


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


def test_tokenizer_json_comes_before_vocab_txt_and_sets_its_own_case(tmp_path: Path) -> None:
    cased = tiny_vocabulary(tmp_path / "cased", lower=False)
    transformers.BertTokenizer.from_pretrained(cased, do_lower_case=False)._tokenizer.save(
        str(tmp_path / "tokenizer.json")
    )
    folder = tiny_vocabulary(tmp_path, lower=True)
    assert encoded(Tokenizer(folder, 32), [("Hello World",)])[0][0][1:-1] == [5, 7]


def test_a_tokenizer_s_own_truncation_and_padding_are_switched_off(embedded: Path, tmp_path: Path) -> None:
    values = json.loads((embedded / "tokenizer.json").read_text("utf-8"))
    values["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    values["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "[PAD]",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    rows = [("one two three four five six seven",), ("one",)]
    assert encoded(Tokenizer(tmp_path, 64), rows) == encoded(Tokenizer(embedded, 64), rows)


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


def test_a_row_never_has_more_than_max_length_tokens(embedded: Path) -> None:
    for max_length in (4, 8, 9, 30):
        tokenizer = Tokenizer(embedded, max_length)
        lengths = tokenizer.encode([(a, b) for a in TEXTS for b in TEXTS]).lengths
        assert lengths.max() == max_length and lengths.min() == 3
        assert tokenizer.encode([(text,) for text in TEXTS]).lengths.max() == max_length


def test_a_fingerprint_changes_with_length_and_vocabulary(tmp_path: Path) -> None:
    first = tiny_vocabulary(tmp_path / "first", lower=True)
    cased = tiny_vocabulary(tmp_path / "cased", lower=False)
    prints = [Tokenizer(first, 16), Tokenizer(first, 17), Tokenizer(cased, 16), Tokenizer(first, 16)]
    a, b, c, again = [tokenizer.fingerprint() for tokenizer in prints]
    assert len({a, b, c}) == 3 and again == a


def test_a_folder_without_a_usable_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer, expected tokenizer\.json or vocab\.txt"):
        Tokenizer(tmp_path, 16)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\n")
    (tmp_path / "tokenizer_config.json").write_text('{"cls_token": "<s>"}')
    with pytest.raises(CheckpointError, match="the tokenizer has no token <s>, expected that of a BERT"):
        Tokenizer(tmp_path, 16)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not readable as a tokenizer"):
        Tokenizer(tmp_path, 16)


# ---------------------------------------------------------------------------------------------- rows and batches


def pair_rows(folder: Path) -> TokenizedRows:
    header = "id\tsentence1\tsentence2\tsimilarity\n"
    content = header + "x\thello\tWorld hello\t1.5\ny\tHello World caf\tWorld\t2\nz\tcafe\tcafe\t5\n"
    file = read_examples(written(folder, content), STS, labelled=True)
    return tokenize(STS, file.examples, Tokenizer(tiny_vocabulary(folder / "words", lower=False), 32), CPU)


def test_a_batch_holds_the_rows_asked_for_in_that_order(tmp_path: Path) -> None:
    data = pair_rows(tmp_path)
    batch = data.batch([2, 0])
    assert batch.tokens is not None and len(batch) == 2
    assert batch.rows == [2, 0] and batch.labels.tolist() == [5.0, 1.5]
    assert batch.tokens.input_ids.tolist() == [2, 10, 3, 10, 3, 2, 6, 3, 7, 6, 3]
    assert batch.tokens.token_type_ids.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert batch.tokens.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    assert batch.tokens.first_tokens.tolist() == [0, 5]
    assert batch.tokens.layout.lengths.tolist() == [5, 6]
    assert batch.labels.dtype == torch.float32


def test_selected_rows_are_the_same_rows(tmp_path: Path) -> None:
    data = pair_rows(tmp_path)
    chosen = data.select(np.array([1, 0]))
    assert chosen.ids == ["y", "x"] and chosen.labels.tolist() == [2.0, 1.5] and len(chosen) == 2
    for new, old in ((0, 1), (1, 0)):
        ours, theirs = chosen.batch([new]).tokens, data.batch([old]).tokens
        assert ours is not None and theirs is not None
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.token_type_ids, theirs.token_type_ids)


def test_rows_by_length_are_all_rows_with_the_longest_first(tmp_path: Path) -> None:
    data = pair_rows(tmp_path)
    assert data.tokens.lengths.tolist() == [6, 7, 5]
    assert data.by_length().tolist() == [1, 0, 2]


def test_deferred_rows_are_made_once_when_a_batch_is_asked_for() -> None:
    features, labels = torch.arange(8.0).view(4, 2), np.array([0, 1, 2, 3], np.float32)
    made = []

    def make() -> FeatureRows:
        made.append(True)
        return FeatureRows(features, labels)

    data = DeferredRows(labels, make)
    assert len(data) == 4 and not made
    for _ in range(2):
        batch = data.batch([3, 1])
        assert batch.features is not None and torch.equal(batch.features, features[[3, 1]])
        assert batch.labels.tolist() == [3, 1] and data.by_length().tolist() == [0, 1, 2, 3]
    assert len(made) == 1


def test_feature_rows_give_features_and_labels_of_the_rows_asked_for() -> None:
    features = torch.arange(12.0).view(4, 3)
    data = FeatureRows(features, np.array([0, 1, 2, 3], np.float32))
    batch = data.batch(np.array([3, 1]))
    assert batch.tokens is None and batch.features is not None
    assert torch.equal(batch.features, features[[3, 1]]) and batch.labels.tolist() == [3, 1]
    assert list(batch.rows) == [3, 1] and len(data) == 4 and sorted(data.by_length()) == [0, 1, 2, 3]


def test_the_longest_share_of_the_rows_is_cut_and_later_ones_first() -> None:
    lengths = np.array([5, 9, 3, 9, 7, 9, 1, 2, 4, 6])
    kept, cut = longest_cut(lengths, 0.2)
    assert kept.tolist() == [0, 1, 2, 4, 6, 7, 8, 9] and cut == 9
    kept, cut = longest_cut(lengths, 0.35)
    assert kept.tolist() == [0, 2, 4, 6, 7, 8, 9] and cut == 7
    kept, cut = longest_cut(lengths, 0.0)
    assert kept.tolist() == list(range(10)) and cut == 9
    random = np.random.default_rng(0).integers(3, 60, 1234)
    kept, cut = longest_cut(random, 0.02)
    dropped = np.setdiff1d(np.arange(1234), kept)
    assert len(dropped) == 24 and random[dropped].min() >= cut == random[kept].max()


# ------------------------------------------------------------------------------------------------ order of rows


@pytest.mark.parametrize(("num_rows", "rows_per_draw"), [(10, 3), (12, 4), (5, 8), (1, 1), (100, 7)])
def test_every_pass_holds_each_row_once_and_its_last_draw_is_shorter(num_rows: int, rows_per_draw: int) -> None:
    stream = RowStream(num_rows, rows_per_draw, seed=3)
    assert stream.draws_per_pass == int(np.ceil(num_rows / rows_per_draw))
    for number in range(4):
        draws = [stream.rows(number * stream.draws_per_pass + i) for i in range(stream.draws_per_pass)]
        assert [len(draw) for draw in draws[:-1]] == [rows_per_draw] * (len(draws) - 1)
        assert len(draws[-1]) == num_rows - rows_per_draw * (len(draws) - 1)
        assert sorted(np.concatenate(draws).tolist()) == list(range(num_rows))


def test_every_pass_has_a_new_order() -> None:
    stream = RowStream(20, 20, seed=0)
    assert len({tuple(stream.rows(i)) for i in range(30)}) == 30
    assert tuple(stream.rows(0)) != tuple(range(20))


def test_a_position_alone_determines_the_rows() -> None:
    forward = RowStream(23, 4, seed=9)
    in_turn = [forward.rows(i) for i in range(40)]
    for i in np.random.default_rng(0).permutation(40):
        assert np.array_equal(RowStream(23, 4, seed=9).rows(int(i)), in_turn[i])
        assert np.array_equal(forward.rows(int(i)), in_turn[i])


def test_streams_of_other_seeds_have_other_orders_and_no_global_generator_is_touched() -> None:
    state = np.random.get_state()[1].copy()
    assert not np.array_equal(RowStream(50, 50, seed=1).rows(0), RowStream(50, 50, seed=2).rows(0))
    first, second = (epoch_order(50, np.random.default_rng(4)) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.array_equal(np.random.get_state()[1], state)
