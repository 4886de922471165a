"""The edits against a made-up source of synonyms, WordNet against a dictionary of a few words written here."""

import csv
import io
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import BertNormalizer

import eda
from eda import EDITS, EdaConfig, EdaError, WordNet, augment_rows, balance, edited_text

ROOT = Path(__file__).resolve().parent.parent
CONFIG = EdaConfig()
SEEDS = range(200)


def fake_synonyms(word: str) -> list[str]:
    """Every word has synonyms, stop words too, and some of them are stop words."""
    return [f"{word}ish", "not", f"very {word}", "the"]


def no_synonyms(word: str) -> list[str]:
    return []


def unquoted(line: str) -> list[str]:
    return next(csv.reader([line], delimiter="\t"))


# -------------------------------------------------------------------------------------------------------- edits

TEXT = 'The 39 Steps : a wickedly funny , 98 % stylish farce - isn\'t it ? "Bravo!" (twice) at NASA'
WORDS = TEXT.split()


def test_number_of_edits_is_the_share_of_the_words_but_at_least_one() -> None:
    assert [eda.num_edits(0.1, n) for n in (0, 1, 9, 10, 19, 20, 35)] == [1, 1, 1, 1, 1, 2, 3]
    assert eda.num_edits(0.5, 7) == 3


@pytest.mark.parametrize("n", [1, 2, 3])
def test_replacement_changes_n_words_and_leaves_the_others_byte_for_byte(n: int) -> None:
    for seed in SEEDS:
        edited = eda.synonym_replacement(WORDS, random.Random(seed), n, fake_synonyms)
        assert len(edited) == len(WORDS)
        assert sum(new != old for new, old in zip(edited, WORDS, strict=True)) == n


def test_replacement_reaches_every_content_word_and_no_other() -> None:
    changed = set()
    for seed in SEEDS:
        edited = eda.synonym_replacement(WORDS, random.Random(seed), 1, fake_synonyms)
        changed |= {old for new, old in zip(edited, WORDS, strict=True) if new != old}
    assert changed == {"Steps", "wickedly", "funny", "stylish", "farce", '"Bravo!"', "(twice)", "NASA"}


def test_replacement_keeps_the_punctuation_and_the_capital_of_the_word_it_replaces() -> None:
    assert eda.synonym_replacement(['("Film",'], random.Random(0), 1, lambda _: ["movie"]) == ['("Movie",']
    assert eda.synonym_replacement(["film?"], random.Random(0), 1, lambda _: ["moving picture"]) == ["moving picture?"]
    assert eda.synonym_replacement(["delhi"], random.Random(0), 1, lambda _: ["Old Delhi"]) == ["Old Delhi"]


def test_replacement_takes_all_words_that_have_synonyms_when_fewer_than_n_do() -> None:
    assert eda.synonym_replacement(["a", "film"], random.Random(0), 9, lambda _: ["movie"]) == ["a", "movie"]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_insertion_adds_n_synonyms_and_leaves_all_words_in_order(n: int) -> None:
    content = {"steps", "wickedly", "funny", "stylish", "farce", "bravo", "twice", "nasa"}
    allowed = {synonym for word in content for synonym in (f"{word}ish", f"very {word}")}
    sources, places = set(), set()
    for seed in SEEDS:
        edited = eda.random_insertion(WORDS, random.Random(seed), n, fake_synonyms)
        new = [word for word in edited if word in allowed]
        assert [word for word in edited if word not in allowed] == WORDS
        assert len(new) == n
        sources |= {word.removeprefix("very ").removesuffix("ish") if " " not in word else word[5:] for word in new}
        places.add(edited.index(new[0]))
    assert sources >= {"steps", "farce", "twice"}
    assert {0, len(WORDS)} <= places or n > 1, "a synonym may stand first and last"


@pytest.mark.parametrize(
    "word", ["the", "The", "not", "isn't", "isn’t", "n't", "It", '"is', "us", "WHO", "may", "can't"]
)
def test_a_stop_word_is_neither_replaced_nor_inserted_from(word: str) -> None:
    for seed in range(20):
        assert eda.synonym_replacement([word, word], random.Random(seed), 2, fake_synonyms) == [word, word]
        assert eda.random_insertion([word, word], random.Random(seed), 2, fake_synonyms) == [word, word]


def test_a_stop_word_is_no_synonym() -> None:
    assert eda.word_synonyms("non", lambda _: ["not", "Not", "none at all", "the"]) == ["none at all"]


def test_a_word_is_no_synonym_of_itself() -> None:
    assert eda.word_synonyms("Film", lambda _: ["film", "FILM", "movie"]) == ["movie"]


@pytest.mark.parametrize(
    "word", ["2016", "3.5", "B2B", "20th", "?", "...", "$5", "naïve", "фильм", "電影", "فيلم", "😀", "a1-b"]
)
def test_numbers_punctuation_and_other_scripts_have_no_synonyms(word: str) -> None:
    assert eda.word_synonyms(word, lambda _: ["wrong"]) == []


@pytest.mark.parametrize("n", [1, 2, 6])
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
    words = [str(i) for i in range(50)]
    generator = random.Random(0)
    kept = Counter[str]()
    for _ in range(2000):
        edited = eda.random_deletion(words, generator, 0.3)
        assert edited == sorted(edited, key=int)
        kept.update(edited)
    assert set(kept) == set(words)
    assert all(abs(kept[word] / 2000 - 0.7) < 0.05 for word in words)


def test_deletion_leaves_a_word_even_where_every_word_would_go() -> None:
    left = Counter(tuple(eda.random_deletion(["a", "b", "c"], random.Random(seed), 0.999)) for seed in SEEDS)
    assert set(left) == {("a",), ("b",), ("c",)}


def test_deletion_never_leaves_only_what_a_tokenizer_drops() -> None:
    for seed in SEEDS:
        assert "word" in eda.random_deletion(["\u200b", "word", "\u0301", "\ufffd"], random.Random(seed), 0.9)


def test_deletion_leaves_a_text_of_unknown_signs_alone() -> None:
    words = ["\u0378", "\ufffd", "\u0301"]
    assert eda.random_deletion(words, random.Random(0), 0.9) == words


@pytest.mark.parametrize("name", EDITS)
def test_digits_case_and_punctuation_of_untouched_words_stay(name: str) -> None:
    for seed in SEEDS:
        edited = edited_text(TEXT, EDITS[name], random.Random(seed), CONFIG, lambda word: [f"<{word}>"]).split()
        touched = [word for word in edited if "<" in word]
        assert not Counter(word for word in edited if "<" not in word) - Counter(WORDS)
        assert len(touched) == (2 if name in ("replacement", "insertion") else 0)
        assert name == "deletion" or len(edited) == len(WORDS) + (2 if name == "insertion" else 0)


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("text", ["", " ", "42", "7 8 9", "?", "the", "\u200b", "\x00", "film"])
def test_tiny_texts_survive_every_edit(name: str, text: str) -> None:
    for seed in range(20):
        edited = edited_text(text, EDITS[name], random.Random(seed), CONFIG, fake_synonyms)
        assert bool(edited.split()) == bool(text.split())
        if text in ("42", "?", "the", "\u200b", " "):
            assert edited == text


@pytest.mark.parametrize("name", EDITS)
def test_digits_stay_in_a_text_of_digits(name: str) -> None:
    for seed in range(20):
        edited = edited_text("2016 10 31", EDITS[name], random.Random(seed), CONFIG, fake_synonyms)
        assert set(edited.split()) <= {"2016", "10", "31"}
        assert name == "deletion" or sorted(edited.split()) == ["10", "2016", "31"]


def test_a_text_that_no_edit_changes_keeps_its_spacing() -> None:
    text = "  the   2nd\tof\u00a0May "
    assert edited_text(text, EDITS["replacement"], random.Random(0), CONFIG, no_synonyms) == text
    assert edited_text(text, EDITS["insertion"], random.Random(0), CONFIG, no_synonyms) == text


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("replacement", EdaConfig(alpha_replacement=0.5)),
        ("insertion", EdaConfig(alpha_insertion=0.5)),
        ("swap", EdaConfig(alpha_swap=0.5)),
        ("deletion", EdaConfig(deletion_prob=0.5)),
    ],
)
def test_each_setting_governs_its_own_edit(name: str, config: EdaConfig) -> None:
    text = " ".join(f"word{chr(97 + i)}" for i in range(20))
    for other in EDITS:
        results = {
            edited_text(text, EDITS[other], random.Random(3), settings, fake_synonyms) for settings in (CONFIG, config)
        }
        assert len(results) == (2 if other == name else 1)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"alpha_replacement": 0.0}, "--eda_alpha"),
        ({"alpha_insertion": 1.5}, "--eda_alpha"),
        ({"alpha_swap": -0.1}, "--eda_alpha"),
        ({"alpha_swap": float("nan")}, "--eda_alpha"),
        ({"deletion_prob": 0.0}, "--eda_deletion_prob"),
        ({"deletion_prob": 1.0}, "--eda_deletion_prob"),
        ({"deletion_prob": float("nan")}, "--eda_deletion_prob"),
    ],
)
def test_a_bad_setting_is_one_line_with_its_flag(values: dict[str, float], flag: str) -> None:
    with pytest.raises(ValueError, match=f"^{flag} .*: expected a number above 0") as error:
        EdaConfig(**values)
    assert "\n" not in str(error.value)


def test_settings_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        EdaConfig(0.1, 0.1)  # type: ignore[call-arg]


# ---------------------------------------------------------------------------------------------------- balancing


def test_balance_fills_every_class_up_to_the_most_common_one() -> None:
    labels = [0] * 7 + [3] * 20 + [1] * 20 + [4]
    added = Counter(labels[row] for row in balance(labels, random.Random(0)))
    assert added == {0: 13, 4: 19}


def test_balance_uses_every_row_equally_often_before_any_again() -> None:
    labels = [0] * 7 + [1] * 27
    rows = balance(labels, random.Random(1))
    assert [sorted(rows[i : i + 7]) for i in (0, 7)] == [list(range(7))] * 2
    assert len(set(rows[14:])) == 6
    assert rows[:7] != rows[7:14], "each round has its own order"


def test_balance_draws_other_rows_for_another_seed_and_the_same_for_the_same() -> None:
    labels = [0] * 50 + [1] * 60
    assert balance(labels, random.Random(1)) == balance(labels, random.Random(1))
    assert balance(labels, random.Random(1)) != balance(labels, random.Random(2))


@pytest.mark.parametrize("labels", [[], [3], [0, 1], [2, 2, 2]])
def test_balance_adds_nothing_where_classes_are_equal(labels: list[int]) -> None:
    assert balance(labels, random.Random(0)) == []


def test_augmented_rows_fill_up_the_rarer_classes_and_hold_no_given_row_twice() -> None:
    rows = [(f"word{i} and more words here",) for i in range(30)]
    labels = [0] * 4 + [1] * 26
    new = augment_rows(rows, labels, CONFIG, 0, fake_synonyms)
    assert [label for _, label in new] == [0] * 22
    assert all(any(f"word{i}" in texts[0] for i in range(4)) or texts[0].count(" ") < 4 for texts, _ in new)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    rows = [(f"a film number {i} with many words in it", "another text of several words") for i in range(40)]
    labels = [i % 4 == 0 for i in range(40)]
    first, again, other = (augment_rows(rows, labels, CONFIG, seed, fake_synonyms) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_the_texts_of_a_pair_are_edited_each_on_its_own() -> None:
    left, right = "alpha bravo charlie delta echo foxtrot", "one2 two2 three2 four2 five2"
    rows, labels = [(left, right)] * 101, [0] + [1] * 100
    new = [texts for texts, _ in augment_rows(rows, labels, CONFIG, 0, fake_synonyms)]
    for a, b in new:
        assert not set(a.split()) & set(right.split())
        assert set(b.split()) <= set(right.split())
    assert sum(a != left and b != right for a, b in new) > 20
    swapped = [texts for texts in new if sorted(texts[1].split()) == sorted(right.split()) and texts[1] != right]
    assert swapped, "words changed places"
    assert all(sorted(a.split()) == sorted(left.split()) for a, _ in swapped), "one edit a row"


def test_the_four_edits_are_drawn_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    used = Counter[str]()

    def counting(name: str) -> eda.Edit:
        def edit(words: Sequence[str], *_: object) -> list[str]:
            used[name] += 1
            return list(words)

        return edit

    monkeypatch.setattr(eda, "EDITS", {name: counting(name) for name in EDITS})
    augment_rows([("one text",)] * 2001, [0] + [1] * 2000, CONFIG, 0, no_synonyms)
    assert set(used) == {"replacement", "insertion", "swap", "deletion"}
    assert all(abs(count - 500) < 100 for count in used.values())


def test_global_generators_are_neither_read_nor_moved() -> None:
    rows, labels = [("some words to be edited here",)] * 30, [0] * 10 + [1] * 20
    random.seed(1)
    first, before = augment_rows(rows, labels, CONFIG, 0, fake_synonyms), random.getstate()
    random.seed(2)
    assert augment_rows(rows, labels, CONFIG, 0, fake_synonyms) == first
    random.seed(1)
    assert random.getstate() == before


def test_importing_touches_no_generator_and_loads_no_wordnet() -> None:
    code = (
        "import random, sys; random.seed(3); state = random.getstate(); import eda; "
        "assert random.getstate() == state, 'seeded'; assert 'nltk' not in sys.modules, 'nltk'; "
        "assert not {'torch', 'numpy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ------------------------------------------------------------------------------------------------- any unicode

NASTY = st.text(
    alphabet=" \t\n\r\"'\x00\x07\x1c\x85\u00a0\u0301\u200b\u200f\u2028\u202e\ufeff\ufffdaZ9א😀é,-", max_size=30
)
TEXTS = st.one_of(NASTY, st.text(max_size=30), st.builds(lambda a, b: f"{a} {'x' * 10_000} {b}", NASTY, NASTY))


def what_bert_sees(text: str) -> str:
    normalizer = BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)
    return str(normalizer.normalize_str(text)).strip()


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from(list(EDITS)), st.integers(0, 99), st.sampled_from([0.1, 0.9]))
def test_no_edit_raises_or_empties_a_text(text: str, name: str, seed: int, amount: float) -> None:
    config = EdaConfig(alpha_replacement=amount, alpha_insertion=amount, alpha_swap=amount, deletion_prob=amount)
    edited = edited_text(text, EDITS[name], random.Random(seed), config, fake_synonyms)
    assert bool(edited.split()) == bool(text.split())
    assert what_bert_sees(edited) or not what_bert_sees(text)
    if name in ("swap", "deletion"):
        assert Counter(edited.split()) <= Counter(text.split())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_any_text_goes_through_the_command_as_through_the_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(eda, "WordNet", lambda folder: fake_synonyms)
    rows = [(a.replace("\t", " "), b.replace("\n", " ")) for a, b in rows]  # both: as if a quote were never closed
    plain = [("another", "row")] * (3 * len(rows))  # more of the other class, so that each text is edited twice
    labels = [0] * len(rows) + [1] * len(plain)
    rows = [*rows, *plain]
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    target.unlink(missing_ok=True)
    cells = [
        [str(i), f"id{i}", *texts, f"{label}.0"] for i, (texts, label) in enumerate(zip(rows, labels, strict=True))
    ]
    source.write_text(as_csv([["", "id", "sentence1", "sentence2", "is_duplicate"], *cells]), "utf-8", newline="")
    assert eda.main([str(source), str(target), "--seed", "7"]) == 0
    written = eda.read_table(target)
    assert [cells for _, cells in written.rows[: len(rows)]] == cells
    expected = augment_rows(rows, labels, CONFIG, 7, fake_synonyms)
    assert [(tuple(cells[2:4]), int(float(cells[4]))) for _, cells in written.rows[len(rows) :]] == expected


def as_csv(rows: Sequence[Sequence[str]]) -> str:
    """Tab-separated lines as other programs write them, every cell in quotes where it needs them."""
    buffer = io.StringIO()
    csv.writer(buffer, delimiter="\t").writerows(rows)  # ends lines with \r\n, so that both are quoted
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------ WordNet


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
        lines = [
            f"{word} {letters[part]} {len(found)} 0 {len(found)} 0 {' '.join(f'{offset:08d}' for offset in found)}\n"
            for word, found in sorted(index.items())
        ]
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text("  1 A licence\n" + "".join(lines))
        (folder / f"{part}.exc").write_text("ran run\n" if part == "verb" else "")
    return folder


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a small WordNet; nothing else is installed."""
    data = pytest.importorskip("nltk.data")
    monkeypatch.setattr(data, "path", [])
    monkeypatch.setattr(eda, "SYSTEM_WORDNETS", ())
    return write_wordnet(tmp_path / "wordnet")


def test_synonyms_are_the_other_lemmas_of_all_senses_with_spaces(wordnet: Path) -> None:
    synonyms = WordNet(wordnet)
    assert synonyms("film") == ("movie", "moving picture", "Celluloid", "shoot")
    assert synonyms("funny") == ("amusing",)
    assert synonyms("qwerty") == ()


def test_inflected_words_find_synonyms_but_not_their_own_base_form(wordnet: Path) -> None:
    synonyms = WordNet(wordnet)
    assert synonyms("films") == ("movie", "moving picture", "Celluloid", "shoot")
    assert synonyms("ran") == ("scat",)


def test_a_word_is_looked_up_once(wordnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synonyms = WordNet(wordnet)
    words = []
    look_up = synonyms._look_up

    def counted(word: str) -> tuple[str, ...]:
        words.append(word)
        return look_up(word)

    monkeypatch.setattr(synonyms, "_look_up", counted)
    assert [synonyms("film") for _ in range(3)] == [("movie", "moving picture", "Celluloid", "shoot")] * 3
    assert [synonyms("nothing") for _ in range(3)] == [()] * 3
    assert words == ["film", "nothing"]


def test_no_warning_comes_from_loading(wordnet: Path, recwarn: pytest.WarningsRecorder) -> None:
    WordNet(wordnet)("film")
    assert not [warning for warning in recwarn if "ultilingual" in str(warning.message)]


def test_the_system_wordnet_is_found(wordnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eda, "SYSTEM_WORDNETS", (wordnet.parent / "missing", wordnet))
    assert WordNet()("film")


@pytest.mark.parametrize("archive", [False, True])
def test_the_data_of_nltk_comes_first(wordnet: Path, monkeypatch: pytest.MonkeyPatch, archive: bool) -> None:
    import shutil

    import nltk.data

    corpora = wordnet.parent / "nltk_data" / "corpora"
    write_wordnet_of_nltk = corpora / "wordnet"
    corpora.mkdir(parents=True)
    write_wordnet(write_wordnet_of_nltk)
    if archive:
        shutil.make_archive(str(write_wordnet_of_nltk), "zip", corpora, "wordnet")
        shutil.rmtree(write_wordnet_of_nltk)
    monkeypatch.setattr(nltk.data, "path", [str(corpora.parent)])
    monkeypatch.setattr(eda, "SYSTEM_WORDNETS", (wordnet,))
    synonyms = WordNet()
    assert synonyms("film") == ("movie", "moving picture", "Celluloid", "shoot")
    assert "corpora" in str(synonyms._root)


def test_without_wordnet_one_line_says_what_to_install(wordnet: Path) -> None:
    with pytest.raises(
        EdaError, match=r"apt-get install wordnet-base; .*nltk\.downloader wordnet; --wordnet DIR"
    ) as error:
        WordNet()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["data.noun", "index.adv", "verb.exc"])
def test_an_incomplete_directory_is_named(wordnet: Path, missing: str) -> None:
    (wordnet / missing).unlink()
    with pytest.raises(EdaError, match=f"--wordnet .*: no {missing} there"):
        WordNet(wordnet)


@pytest.mark.parametrize(("name", "content"), [("index.noun", b"film n x\n"), ("data.noun", b"\xff\xfe")])
def test_damaged_files_are_one_line(wordnet: Path, name: str, content: bytes, recwarn: pytest.WarningsRecorder) -> None:
    (wordnet / name).write_bytes(content)
    with pytest.raises(EdaError, match="not readable as WordNet") as error:
        WordNet(wordnet)("film")
    assert "\n" not in str(error.value)
    assert not [warning for warning in recwarn if "WordNet" in str(warning.message)]


def test_the_installed_wordnet_knows_everyday_words() -> None:
    pytest.importorskip("nltk")
    try:
        synonyms = WordNet()
    except EdaError as error:
        pytest.skip(str(error))
    assert "movie" in synonyms("film")
    assert "motion picture" in synonyms("films")
    assert "film" not in synonyms("films")


# ------------------------------------------------------------------------------------------------------ command

SENTENCES = """\
\tid\tsentence\tsentiment
7\tx1\t A well-made movie , full of 3 surprises .\t3
4\tx2\t"She said ""go"" and left ."\t3
9\tx3\tThe end never comes .\t0
5\tx4\tNo label here\t
6\tx3\tThe same id again\t3
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command on in.csv, with this content, into out.csv; synonyms are made up."""
    monkeypatch.setattr(eda, "WordNet", lambda folder: fake_synonyms)
    monkeypatch.chdir(tmp_path)

    def run(content: str | bytes = SENTENCES, *arguments: str) -> int:
        Path("in.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return eda.main(["in.csv", "out.csv", *arguments])

    return run


def test_the_command_appends_rows_until_classes_are_equal(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command() == 0
    written = Path("out.csv").read_text()
    assert written.startswith(SENTENCES)
    new = [unquoted(line) for line in written[len(SENTENCES) :].splitlines()]
    assert [(index, name, label) for index, name, _, label in new] == [("10", "x3-eda1", "0"), ("11", "x3-eda2", "0")]
    assert capsys.readouterr().out.splitlines() == [
        "in.csv: 1 without a label, only copied: line 5",
        "sentiment 0: 1 rows + 2 new = 3",
        "sentiment 3: 3 rows + 0 new = 3",
        "out.csv: 5 rows + 2 new, seed 0",
    ]
    assert sorted(os.listdir()) == ["in.csv", "out.csv"]


def test_a_file_of_pairs_keeps_the_form_of_its_labels(command: Callable[..., int]) -> None:
    rows = "".join(f"{i}\tq{i}\tIs it {i} o'clock now?\tWhat time is it?\t{float(i == 0)}\n" for i in range(4))
    assert command("\tid\tsentence1\tsentence2\tis_duplicate\n" + rows) == 0
    new = [line.split("\t") for line in Path("out.csv").read_text().splitlines()[5:]]
    assert [(cells[0], cells[1], cells[4]) for cells in new] == [("4", "q0-eda1", "1.0"), ("5", "q0-eda2", "1.0")]


def test_a_new_id_is_never_one_that_the_file_has(command: Callable[..., int]) -> None:
    assert command("id\tsentence\tsentiment\na\tone\t0\na-eda1\ttwo\t1\nb\tthree\t1\n") == 0
    assert Path("out.csv").read_text().splitlines()[-1].startswith("a-eda2\t")


def test_line_ends_and_the_last_line_are_as_in_the_file(command: Callable[..., int]) -> None:
    content = SENTENCES.replace("\n", "\r\n").removesuffix("\r\n")
    assert command(content) == 0
    written = Path("out.csv").read_bytes()
    assert written.startswith(content.encode())
    assert eda.read_table(Path("out.csv")).rows[-1][1][1] == "x3-eda2"
    assert written.endswith(b"\t0\r\n")


@pytest.mark.parametrize("cell", ['"one\rtwo"', "one\rtwo"])
def test_a_carriage_return_in_a_cell_stays_quoted_or_not(cell: str, command: Callable[..., int]) -> None:
    content = f"id\tsentence\tsentiment\na\t{cell}\t0\nb\tx\t1\nc\ty\t1\n"
    assert command(content) == 0
    assert Path("out.csv").read_bytes().startswith(content.encode())
    assert len(eda.read_table(Path("out.csv")).rows) == 4


def test_another_label_column_may_be_named(command: Callable[..., int]) -> None:
    content = "id\tsentence\ttopic\na\tone two\t12\nb\tthree\t-3\nc\tfour\t-3\n"
    assert command(content, "--label_column", "topic") == 0
    assert Path("out.csv").read_text().splitlines()[-1].startswith("a-eda1\t")


def test_a_balanced_file_is_copied(command: Callable[..., int]) -> None:
    assert command("id\tsentence\tsentiment\na\tone\t0\nb\ttwo\t1\n") == 0
    assert Path("out.csv").read_bytes() == Path("in.csv").read_bytes()


def test_the_command_writes_the_same_bytes_in_every_process(wordnet: Path, tmp_path: Path) -> None:
    rows = "".join(f"{i}\tx{i}\ta funny film ran for {i} hours and was not a movie\t{i // 9}\n" for i in range(10))
    (tmp_path / "in.csv").write_text("\tid\tsentence\tsentiment\n" + rows)
    processes = [
        subprocess.Popen(
            [sys.executable, "eda.py", tmp_path / "in.csv", tmp_path / f"{number}.csv", "--wordnet", wordnet],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(number)},
            stdout=subprocess.DEVNULL,
        )
        for number in (1, 2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()


def test_the_seed_flag_changes_the_file(command: Callable[..., int]) -> None:
    content = "id\tsentence\tsentiment\na\tone two three four\t0\n" + "b\tfive\t1\n" * 9
    written = set()
    for seed in "010":
        assert command(content, "--seed", seed) == 0
        written.add(Path("out.csv").read_bytes())
        Path("out.csv").unlink()
    assert len(written) == 2


def test_the_flags_for_amounts_reach_all_edits(command: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[EdaConfig] = []

    def no_rows(rows: object, labels: object, config: EdaConfig, *_: object) -> list[tuple[int, tuple[str, ...]]]:
        configs.append(config)
        return []

    monkeypatch.setattr(eda, "edited_rows", no_rows)
    assert command(SENTENCES, "--eda_alpha", "0.3", "--eda_deletion_prob", "0.4") == 0
    assert configs == [
        EdaConfig(alpha_replacement=0.3, alpha_insertion=0.3, alpha_swap=0.3, deletion_prob=0.4),
    ]


def test_a_carriage_return_in_a_new_row_stands_in_quotes(command: Callable[..., int]) -> None:
    assert command('id\tsentence\tsentiment\na\t"the\r"\t0\nb\tx\t1\nc\ty\t1\n') == 0
    assert Path("out.csv").read_bytes().endswith(b'\na-eda1\t"the\r"\t0\n')


def test_a_link_to_nowhere_is_not_replaced_either(command: Callable[..., int]) -> None:
    Path("out.csv").symlink_to("nowhere")
    assert command() == 2
    assert Path("out.csv").is_symlink()


def test_an_existing_file_is_never_replaced(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.csv").write_text("mine")
    assert command() == 2
    assert Path("out.csv").read_text() == "mine"
    assert capsys.readouterr().err == "eda.py: out.csv: exists already, expected the name of a new file\n"


def test_a_file_that_appears_meanwhile_is_not_replaced(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def synonyms(word: str) -> list[str]:
        Path("out.csv").write_text("mine")
        return fake_synonyms(word)

    monkeypatch.setattr(eda, "WordNet", lambda folder: synonyms)
    assert command("id\tsentence\tsentiment\na\tgood film\t0\n" + "b\tx\t1\n" * 20) == 2
    assert Path("out.csv").read_text() == "mine"
    assert sorted(os.listdir()) == ["in.csv", "out.csv"]
    assert capsys.readouterr().err == "eda.py: out.csv: exists already, expected the name of a new file\n"


def test_an_interrupted_command_leaves_nothing(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupt)
    assert command() == 130
    assert os.listdir() == ["in.csv"]
    assert capsys.readouterr().err == "eda.py: interrupted, nothing was written\n"


HEADER = "\tid\tsentence\tsentiment\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "in.csv: no rows, expected a header line and rows"),
        (HEADER, "in.csv: no rows, expected a header line and rows"),
        (HEADER + "0\ta\tx\t7\n", "in.csv:2: sentiment is '7', expected a whole number from 0 to 4"),
        (HEADER + "0\ta\tx\t1\n1\tb\ty\tgood\n", "in.csv:3: sentiment is 'good', expected a whole number from 0 to 4"),
        (HEADER + "0\ta\tx\tnan\n", "in.csv:2: sentiment is 'nan', expected a whole number from 0 to 4"),
        (HEADER + "0\ta\tx\t1.5\n", "in.csv:2: sentiment is '1.5', expected a whole number from 0 to 4"),
        (HEADER + "0\ta\tx\n", "in.csv:2: 3 columns, expected 4 as in the header"),
        (HEADER + "zero\ta\tx\t1\n", "in.csv:2: the unnamed first column is 'zero', expected a whole number"),
        (HEADER + "0\ta\tx\t\n", "in.csv: no row has a label in the column 'sentiment'"),
        (HEADER + '0\ta\t"x\t1\n1\tb\ty\t1\n', "in.csv:2: a quoted cell runs over 2 lines, expected a closing"),
        (b"\tid\tsentence\tsentiment\n0\ta\t\xff\t1\n", "in.csv:2: byte 0xff is not valid UTF-8"),
        (
            "id\tsentence\na\tx\n",
            "in.csv:1: found the columns 'id', 'sentence', expected 'sentiment' or 'is_duplicate'",
        ),
        ("id\tsentiment\na\t1\n", "in.csv:1: no column 'sentence1', found 'id', 'sentiment'"),
        ("sentence\tsentiment\nx\t1\n", "in.csv:1: no column 'id', found 'sentence', 'sentiment'"),
        (
            "id\tsentence1\tsentence2\tsimilarity\na\tx\ty\t2.5\n",
            "in.csv:1: similarity is a number on a scale, not a class, so there is nothing to balance",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    content: str | bytes, message: str, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(content) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"eda.py: {message}")
    assert error.count("\n") == 1
    assert os.listdir() == ["in.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.csv", "out.csv"], "missing.csv: No such file or directory"),
        ([".", "out.csv"], ".: Is a directory"),
        (["in.csv", "no/such/out.csv"], "no/such/out.csv: no directory no/such"),
        (["in.csv", "o" * 300], "o"),
        (["in.csv", "out.csv", "--eda_alpha", "0"], "--eda_alpha 0.0: expected a number above 0 and at most 1"),
        (
            ["in.csv", "out.csv", "--eda_deletion_prob", "1"],
            "--eda_deletion_prob 1.0: expected a number above 0 and below",
        ),
        (["in.csv", "out.csv", "--seed", "-1"], "--seed -1: expected a whole number from 0 up"),
        (["in.csv", "out.csv", "--label_column", "topic"], "in.csv:1: no column 'topic', found 'id', 'sentence'"),
        (["in.csv", "out.csv", "--label_column", "similarity"], "in.csv:1: similarity is a number on a scale"),
        (["in.csv", "out.csv", "--alpha", "1"], "unrecognized arguments: --alpha 1"),
        (["in.csv", "out.csv", "--eda_alpha", "x"], "argument --eda_alpha: invalid float value: 'x'"),
        (["in.csv"], "the following arguments are required: OUT.csv"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in.csv").write_text(SENTENCES)
    try:
        code: int | str | None = eda.main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    error_text = capsys.readouterr().err
    assert error_text.startswith(f"eda.py: {message}")
    assert error_text.count("\n") == 1
    assert os.listdir() == ["in.csv"]
