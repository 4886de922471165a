"""The edits against a made-up source of synonyms, WordNet against a dictionary of a few words written here."""

import csv
import io
import itertools
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import BertNormalizer

import eda
from eda import EDITS, EdaConfig, EdaError, WordNet, augment_rows, balance, edited_text
from helpers import Capture, Patch, run_python
from reports import augmented_file

CONFIG = EdaConfig()
SEEDS = range(100)


def fake_synonyms(word: str) -> list[str]:
    """Every word has synonyms, stop words too, and some of them are stop words."""
    return [f"{word}ish", "not", f"very {word}", "the"]


TEXT = 'The 39 Steps : a wickedly funny , 98 % stylish farce - isn\'t it ? "Bravo!" (twice) at NASA'
WORDS = TEXT.split()


@pytest.mark.parametrize("n", [1, 3])
def test_replacement_changes_n_content_words_and_leaves_the_others_byte_for_byte(n: int) -> None:
    changed = set()
    for seed in SEEDS:
        edited = eda.synonym_replacement(WORDS, random.Random(seed), n, fake_synonyms)
        differing = {old for new, old in zip(edited, WORDS, strict=True) if new != old}
        assert len(differing) == n
        changed |= differing
    assert changed == {"Steps", "wickedly", "funny", "stylish", "farce", '"Bravo!"', "(twice)", "NASA"}


@pytest.mark.parametrize("n", [1, 5])
def test_insertion_adds_n_synonyms_and_leaves_all_words_in_order(n: int) -> None:
    content = ("steps", "wickedly", "funny", "stylish", "farce", "bravo", "twice", "nasa")
    source_of = {synonym: word for word in content for synonym in (f"{word}ish", f"very {word}")}
    sources, places = set(), set()
    for seed in SEEDS:
        edited = eda.random_insertion(WORDS, random.Random(seed), n, fake_synonyms)
        new = [word for word in edited if word in source_of]
        assert [word for word in edited if word not in source_of] == WORDS and len(new) == n
        sources |= {source_of[word] for word in new}
        places.add(edited.index(new[0]))
    assert sources == set(content)
    assert {0, len(WORDS)} <= places or n > 1, "a synonym may stand first and last"


def test_a_synonym_takes_the_place_of_the_word_alone() -> None:
    for word, synonym, expected in (
        ('("Film",', "movie", '("Movie",'),  # punctuation and capital of the word stay
        ("film?", "moving picture", "moving picture?"),
        ("delhi", "Old Delhi", "Old Delhi"),
    ):
        words = ["a", word, "the"]  # fewer than n have synonyms
        assert eda.synonym_replacement(words, random.Random(0), 9, lambda _, s=synonym: [s]) == ["a", expected, "the"]


def test_a_stop_word_is_neither_replaced_nor_inserted_from() -> None:
    for word in ["the", "The", "not", "isn't", "isn’t", "n't", "It", '"is', "us", "WHO", "may", "can't"]:
        for seed, edit in itertools.product(range(20), (eda.synonym_replacement, eda.random_insertion)):
            assert edit([word, word], random.Random(seed), 2, fake_synonyms) == [word, word]


def test_a_stop_word_is_no_synonym_nor_the_word_itself_and_numbers_and_other_scripts_have_none() -> None:
    assert eda.word_synonyms("non", lambda _: ["not", "Not", "none at all", "the"]) == ["none at all"]
    assert eda.word_synonyms("Film", lambda _: ["film", "FILM", "movie"]) == ["movie"]
    for word in ["2016", "3.5", "B2B", "20th", "?", "...", "$5", "naïve", "фильм", "電影", "فيلم", "😀", "a1-b"]:
        assert eda.word_synonyms(word, lambda _: ["wrong"]) == []


@pytest.mark.parametrize("n", [1, 6])
def test_swap_only_changes_places(n: int) -> None:
    moved = set()
    for seed in SEEDS:
        edited = eda.random_swap(WORDS, random.Random(seed), n)
        places = [i for i, (new, old) in enumerate(zip(edited, WORDS, strict=True)) if new != old]
        assert Counter(edited) == Counter(WORDS)
        assert len(places) <= 2 * n
        assert len(places) == 2 or n > 1
        moved.update(places)
    assert moved == set(range(len(WORDS)))


def test_deletion_keeps_the_order_and_drops_each_word_with_the_probability() -> None:
    words, generator, kept = [str(i) for i in range(50)], random.Random(0), Counter[str]()
    for _ in range(2000):
        edited = eda.random_deletion(words, generator, 0.3)
        assert edited == sorted(edited, key=int)
        kept.update(edited)
    assert set(kept) == set(words) and all(abs(kept[word] / 2000 - 0.7) < 0.05 for word in words)


def test_deletion_always_leaves_a_word_that_a_tokenizer_sees_where_there_is_one() -> None:
    left = Counter(tuple(eda.random_deletion(["a", "b", "c"], random.Random(seed), 0.999)) for seed in SEEDS)
    assert set(left) == {("a",), ("b",), ("c",)}
    for seed in SEEDS:
        assert "word" in eda.random_deletion(["\u200b", "word", "\u0301", "\ufffd"], random.Random(seed), 0.9)
    words = ["\u0378", "\ufffd", "\u0301"]
    assert eda.random_deletion(words, random.Random(0), 0.9) == words


@pytest.mark.parametrize("name", ["replacement", "deletion"])
def test_each_setting_governs_its_own_edits_and_a_bad_one_is_one_line_with_its_flag(name: str) -> None:
    setting = "deletion_prob" if name == "deletion" else "alpha"
    text, changed = " ".join(f"word{chr(97 + i)}" for i in range(20)), EdaConfig(**{setting: 0.5})
    for other, edit in EDITS.items():
        results = {edited_text(text, edit, random.Random(3), config, fake_synonyms) for config in (CONFIG, changed)}
        assert len(results) == (2 if (other == "deletion") == (name == "deletion") else 1)
    for value in (0.0, 1.5, float("nan"), *([1.0] if name == "deletion" else [])):
        with pytest.raises(EdaError, match=rf"^--eda_{setting} {value}: expected a number above 0[^\n]*$"):
            EdaConfig(**{setting: value})


def test_edits_are_a_share_of_the_words_but_at_least_one_and_a_text_that_none_changes_keeps_its_spacing() -> None:
    assert [eda.num_edits(0.1, n) for n in (0, 1, 9, 19, 20, 35)] == [1, 1, 1, 1, 2, 3]
    text = "  the   2nd\tof\u00a0May "
    for name in ("replacement", "insertion"):
        assert edited_text(text, EDITS[name], random.Random(0), CONFIG, lambda _: []) == text


def test_balance_fills_every_class_and_uses_every_row_equally_often_before_any_again() -> None:
    for labels in ([], [3], [0, 1], [2, 2, 2]):
        assert balance(labels, random.Random(0)) == []
    labels = [0] * 7 + [3] * 20 + [1] * 20 + [4]
    assert Counter(labels[row] for row in balance(labels, random.Random(0))) == {0: 13, 4: 19}
    labels = [0] * 7 + [1] * 27
    rows = balance(labels, random.Random(1))
    assert [sorted(rows[i : i + 7]) for i in (0, 7)] == [list(range(7))] * 2
    assert len(set(rows[14:])) == 6
    assert rows[:7] != rows[7:14], "each round has its own order"
    assert rows != balance(labels, random.Random(2))


def test_augmented_rows_fill_up_the_rarer_classes_and_hold_no_given_row_twice() -> None:
    rows, labels = [(f"word{i} and more words here",) for i in range(30)], [0] * 4 + [1] * 26
    new = augment_rows(rows, labels, CONFIG, 0, fake_synonyms)
    assert [label for _, label in new] == [0] * 22
    assert all(any(f"word{i}" in texts[0] for i in range(4)) or texts[0].count(" ") < 4 for texts, _ in new)


def test_the_texts_of_a_pair_are_edited_each_on_its_own() -> None:
    left, right = "alpha bravo charlie delta echo foxtrot", "one2 two2 three2 four2 five2"
    new = [texts for texts, _ in augment_rows([(left, right)] * 101, [0] + [1] * 100, CONFIG, 0, fake_synonyms)]
    assert not any(set(a.split()) & set(right.split()) for a, _ in new)
    assert all(set(b.split()) <= set(right.split()) for _, b in new)
    assert sum(a != left and b != right for a, b in new) > 20
    swapped = [a for a, b in new if sorted(b.split()) == sorted(right.split()) and b != right]
    assert swapped, "words changed places"
    assert all(sorted(a.split()) == sorted(left.split()) for a in swapped), "one edit a row"


def test_the_four_edits_are_drawn_equally_often(monkeypatch: Patch) -> None:
    monkeypatch.setattr(eda, "EDITS", {name: lambda *_, name=name: [name] for name in EDITS})
    new = augment_rows([("one text",)] * 2001, [0] + [1] * 2000, CONFIG, 0, lambda _: [])
    used = Counter(text for (text,), _ in new)
    assert set(used) == {"replacement", "insertion", "swap", "deletion"}
    assert all(abs(count - 500) < 100 for count in used.values())


def test_rows_depend_on_the_seed_alone_and_move_no_global_generator() -> None:
    rows, labels = [("some words to be edited here", "another text of several words")] * 30, [0] * 10 + [1] * 20
    random.seed(1)
    before = random.getstate()
    first = augment_rows(rows, labels, CONFIG, 0, fake_synonyms)
    assert random.getstate() == before
    random.seed(2)
    assert augment_rows(rows, labels, CONFIG, 0, fake_synonyms) == first
    assert augment_rows(rows, labels, CONFIG, 6, fake_synonyms) != first


def test_every_process_gives_the_same_rows_without_importing_nltk(monkeypatch: Patch) -> None:
    code = """
import eda, sys
assert "nltk" not in sys.modules, "which takes a second"
rows = [("a funny film ran for 3 hours and was no movie",)] * 40
print(eda.augment_rows(rows, [0] * 5 + [1] * 35, eda.EdaConfig(), 7, lambda word: [word + "ish", "very " + word]))"""
    shown = list[str]()
    for seed in "12":
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        shown.append(run_python("-c", code))
    assert shown[0] == shown[1] and shown[0].count("hours") > 9


NASTY = st.text(
    alphabet=" \t\n\r\"'\x00\x07\x1c\x85\u00a0\u0301\u200b\u200f\u2028\u202e\ufeff\ufffdaZ9א😀é,-", max_size=30
)
TEXTS = st.one_of(NASTY, st.text(max_size=30), st.builds(lambda a, b: f"{a} {'x' * 10_000} {b}", NASTY, NASTY))


def what_bert_sees(text: str) -> str:
    normalizer = BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)
    return str(normalizer.normalize_str(text)).strip()


TINY = st.sampled_from(["", " ", "42", "7 8 9", "2016 10 31", "?", "the", "\u200b", "\x00", "film", TEXT])


@settings(max_examples=300, deadline=None)
@given(st.one_of(TEXTS, TINY), st.sampled_from(list(EDITS)), st.integers(0, 99), st.sampled_from([0.1, 0.9]))
def test_no_edit_raises_or_empties_a_text_or_changes_an_untouched_word(
    text: str, name: str, seed: int, amount: float
) -> None:
    config = EdaConfig(alpha=amount, deletion_prob=amount)
    edited = edited_text(text, EDITS[name], random.Random(seed), config, lambda word: ["<1>", "<2>"])
    assert bool(edited.split()) == bool(text.split())
    assert what_bert_sees(edited) or not what_bert_sees(text)
    before, after = Counter(text.split()), Counter(edited.split())
    added = sum((after - before).values())
    assert added == sum(count for word, count in (after - before).items() if re.search("<[12]>", word))
    assert name in ("replacement", "insertion") or added == 0
    assert name == "deletion" or after.total() == before.total() + (name == "insertion") * added
    if text in ("42", "?", "the", "\u200b", " "):
        assert edited == text


def write_wordnet(folder: Path) -> Path:
    """A dictionary in WordNet's format, without the lexnames that Debian leaves out. Returns the folder."""
    synsets = {
        "noun": [["film", "movie", "moving_picture"], ["film", "Celluloid"], ["iodine", "I"]],
        "verb": [["film", "shoot"], ["run", "scat"]],
        "adj": [["funny", "amusing"]],
        "adv": [["not", "non"]],
    }
    letters = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
    folder.mkdir()
    for part, groups in synsets.items():
        data = "  1 A licence of several lines stands here.\n"
        index: dict[str, list[int]] = {}
        for words in groups:
            offset = len(data)
            names = " ".join(f"{word} 0" for word in words)
            frames = " 01 + 02 00" if part == "verb" else ""
            data += f"{offset:08d} 03 {letters[part]} {len(words):02x} {names} 000{frames} | a gloss\n"
            for word in words:
                index.setdefault(word.lower(), []).append(offset)
        lines = []
        for word, found in sorted(index.items()):
            offsets = " ".join(f"{offset:08d}" for offset in found)
            lines.append(f"{word} {letters[part]} {len(found)} 0 {len(found)} 0 {offsets}\n")
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text("  1 A licence\n" + "".join(lines))
        (folder / f"{part}.exc").write_text("ran run\n" if part == "verb" else "")
    return folder


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A directory with a small WordNet; nothing else is installed."""
    data = pytest.importorskip("nltk.data")
    monkeypatch.setattr(data, "path", [])
    monkeypatch.setattr(eda, "SYSTEM_WORDNETS", ())
    return write_wordnet(tmp_path / "wordnet")


def test_synonyms_are_the_other_lemmas_of_all_senses_and_not_a_words_own_base_form_looked_up_once(
    wordnet: Path, recwarn: pytest.WarningsRecorder
) -> None:
    film = ("movie", "moving picture", "Celluloid", "shoot")
    expected = {"film": film, "films": film, "funny": ("amusing",), "qwerty": (), "ran": ("scat",)}
    synonyms = WordNet(wordnet)
    assert {word: synonyms(word) for word in expected} == expected
    assert not [warning for warning in recwarn if "ultilingual" in str(warning.message)]
    synonyms._reader.synsets = lambda word: pytest.fail("looked up again")
    assert synonyms("film") == film


@pytest.mark.parametrize("archive", [False, True])
def test_the_data_of_nltk_comes_first(wordnet: Path, monkeypatch: Patch, archive: bool) -> None:
    corpora = wordnet.parent / "nltk_data" / "corpora"
    corpora.mkdir(parents=True)
    write_wordnet(corpora / "wordnet")
    if archive:
        shutil.make_archive(str(corpora / "wordnet"), "zip", corpora, "wordnet")
        shutil.rmtree(corpora / "wordnet")
    monkeypatch.setattr("nltk.data.path", [str(corpora.parent)])
    monkeypatch.setattr(eda, "SYSTEM_WORDNETS", (wordnet,))
    synonyms = WordNet()
    assert synonyms("funny") == ("amusing",) and "corpora" in str(synonyms._root)


def test_without_wordnet_one_line_says_what_to_install(wordnet: Path, monkeypatch: Patch) -> None:
    where = r"apt-get install wordnet-base; .*nltk\.downloader wordnet; --wordnet DIR"
    for folder in (None, wordnet.parent):
        with pytest.raises(EdaError, match=rf"^[^\n]*{where}[^\n]*$"):
            WordNet(folder)
    monkeypatch.setattr(eda, "SYSTEM_WORDNETS", (wordnet.parent, wordnet))
    assert WordNet()("film")


@pytest.mark.parametrize(
    ("name", "content"), [("index.noun", b"film n x\n"), ("data.noun", b"\xff\xfe"), ("verb.exc", None)]
)
def test_damaged_and_missing_files_are_one_line(wordnet: Path, name: str, content: bytes | None) -> None:
    (wordnet / name).unlink() if content is None else (wordnet / name).write_bytes(content)
    with pytest.raises(EdaError, match=r"^[^\n]*not readable as WordNet[^\n]*$"):
        WordNet(wordnet)("film")


def test_the_installed_wordnet_knows_everyday_words() -> None:
    pytest.importorskip("nltk")
    try:
        synonyms = WordNet()
    except EdaError as error:
        pytest.skip(str(error))
    assert "movie" in synonyms("film") and "motion picture" in synonyms("films") and "film" not in synonyms("films")


HEADER = "\tid\tsentence\tsentiment\n"
SENTENCES = f"""\
{HEADER}7\tx1\t A well-made movie , full of 3 surprises .\t3
4\tx2\t"She said ""go"" and left ."\t3
9\tx3\tThe end never comes .\t0
5\tx4\tNo label here\t
6\tx5\tThe same class again\t3
"""
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> Command:
    """Runs the command on in.csv, with this content, into out.csv; returns its status, output and errors."""
    monkeypatch.setattr("eda.WordNet", lambda folder: fake_synonyms)
    monkeypatch.chdir(tmp_path)

    def run(content: str | bytes = SENTENCES, *flags: str, files: tuple[str, ...] = ("in.csv", "out.csv")) -> Any:
        Path("in.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return (augmented_file.main([*files, *flags]), *capsys.readouterr())

    return run


def written(path: str = "out.csv") -> str:
    return Path(path).read_bytes().decode()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last_end", [True, False])
def test_the_command_appends_rows_until_classes_are_equal(end: str, last_end: bool, command: Command) -> None:
    content = SENTENCES.replace("\n", end).removesuffix("" if last_end else end)
    status, shown, _ = command(content)
    assert status == 0 and written().startswith(content)
    new = [line.split("\t") for line in written()[len(SENTENCES.replace("\n", end)) :].split(end)]
    expected = [["", "x3-eda1", "0"], ["", "x3-eda2", "0"], [""]]
    assert [[*cells[:2], *cells[3:]] for cells in new] == expected
    last = "4 rows, 1 without a label, + 2 new, seed 0"
    assert shown.splitlines() == ["class 0: 1 rows + 2 new", "class 3: 3 rows + 0 new", last]
    assert sorted(os.listdir()) == ["in.csv", "out.csv"]


def test_the_rows_are_those_of_the_function_under_the_flags(command: Command) -> None:
    rows = [(f"one two three four {i}\r five", '"quoted" text\u2028') for i in range(30)]
    labels, text = [0] * 10 + [1] * 20, io.StringIO()
    cells = [[f"x{i}", *texts, label] for i, (texts, label) in enumerate(zip(rows, labels, strict=True))]
    csv.writer(text, delimiter="\t").writerows([["id", "sentence1", "sentence2", "is_duplicate"], *cells])
    config = EdaConfig(alpha=0.3, deletion_prob=0.4)
    for seed in (0, 7):
        flags = f"--eda_alpha 0.3 --eda_deletion_prob 0.4 --seed {seed}"
        assert command(text.getvalue(), *flags.split(), files=("in.csv", f"{seed}.csv"))[0] == 0
        found = list(csv.reader(io.StringIO(written(f"{seed}.csv"), newline=""), delimiter="\t"))[31:]
        expected = augment_rows(rows, labels, config, seed, fake_synonyms)
        assert [((a, b), int(label)) for _, a, b, label in found] == expected
    assert written("0.csv") != written("7.csv")


def test_an_existing_file_is_never_replaced(command: Command, monkeypatch: Patch) -> None:
    def synonyms(word: str) -> list[str]:
        Path("out.csv").write_text("mine")
        return fake_synonyms(word)

    monkeypatch.setattr("eda.WordNet", lambda folder: synonyms)
    appearing = HEADER + "0\ta\tgood film\t0\n" + "1\tb\tx\t1\n" * 20
    for content, message in ((appearing, "File exists"), (SENTENCES, "out.csv: exists already, expected the name of")):
        status, _, error = command(content)
        assert (status, written()) == (2, "mine") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "files", "message"),
    [
        ("", "in.csv out.csv", "in.csv:1: found the columns none; expected id, sentence, sentiment; or id, sentence1"),
        ("id\tsimilarity\na\t2.5\n", "in.csv out.csv", "in.csv:1: found the columns id, similarity; expected id,"),
        (HEADER + "0\ta\tx\t1\n1\tb\ty\t2.5\n", "in.csv out.csv", "in.csv:3: sentiment is '2.5', expected"),
        (SENTENCES, "in.csv out.csv --eda_alpha 0", "--eda_alpha 0.0: expected a number above 0 and at most 1"),
        (SENTENCES, "missing.csv out.csv", "missing.csv: No such file"),
        (SENTENCES, "in.csv no/such/out.csv", "no/such/out.csv: No such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(content: str, files: str, message: str, command: Command) -> None:
    status, _, error = command(content, files=tuple(files.split()))
    assert status == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1
    assert os.listdir() == ["in.csv"]
