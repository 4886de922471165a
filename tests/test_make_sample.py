"""The sample data: reproducible, in CS224N's format, natural to read, not to be solved by counting words."""

import csv
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits

from data import make_sample
from data.bag_of_words import bag_of_words_scores
from helpers import Capture
from tasks import TASKS

DATA = Path(__file__).parent.parent / "data"
SAMPLE = DATA / "sample"
NUM_ROWS = {"ids-sst": (1400, 400, 300), "quora": (1600, 400, 300), "sts": (1000, 300, 300)}
COLUMNS = {"ids-sst": "sentence sentiment", "quora": "sentence1 sentence2 is_duplicate"}
COLUMNS["sts"] = "sentence1 sentence2 similarity"
SPLITS = ("train", "dev", "test-student")
FILES = [f"{stem}-{split}.csv" for stem in NUM_ROWS for split in SPLITS]


REVIEWS, QUESTIONS, STATEMENTS = map(make_sample.read_tables, ("reviews", "questions", "statements"))


def rows(name: str) -> list[dict[str, str]]:
    with (SAMPLE / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def texts(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(value for column, value in row.items() if column.startswith("sentence"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make_sample.write_sample(folder := tmp_path_factory.mktemp("fresh"), seed=1)
    return folder


def test_committed_files_are_those_that_the_generator_writes_and_no_others(fresh: Path) -> None:
    assert sorted(path.name for path in fresh.iterdir()) == sorted(path.name for path in SAMPLE.iterdir())
    assert [name for name in FILES if (SAMPLE / name).read_bytes() != (fresh / name).read_bytes()] == []


def test_the_command_writes_other_rows_from_another_seed_into_the_folder_it_is_given(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Fewer of them: they take their time. Not over files that are there."""
    read = make_sample.read_tables
    monkeypatch.setattr(make_sample, "read_tables", lambda name: {**read(name), "num_rows": dict.fromkeys(SPLITS, 9)})
    monkeypatch.setattr(sys, "argv", ["make_sample.py", "--out", str(tmp_path / "new" / "folder"), "--seed", "2"])
    make_sample.main()
    for name in FILES:
        found = (tmp_path / "new" / "folder" / name).read_text().splitlines()
        assert len(found) == 10 and not {*found[1:]} & {*(fresh / name).read_text().splitlines()}
    with pytest.raises(SystemExit):
        make_sample.main()
    assert "ids-sst-dev.csv is there already, expected a folder without csv files" in capsys.readouterr().err


@pytest.mark.parametrize("stem", NUM_ROWS)
def test_files_have_the_columns_and_the_rows_of_their_task(stem: str) -> None:
    labelled = ["", "id", *COLUMNS[stem].split()]
    unlabelled = [*(["0"] if stem == "ids-sst" else []), *labelled[:-1]]
    for split, header, num_rows in zip(SPLITS, (labelled, labelled, unlabelled), NUM_ROWS[stem], strict=True):
        lines = [line.split("\t") for line in (SAMPLE / f"{stem}-{split}.csv").read_text("utf-8").splitlines()]
        assert lines[0] == header and len(lines) == 1 + num_rows
        assert {len(cells) for cells in lines} == {len(header)}


@pytest.mark.parametrize("stem", NUM_ROWS)
def test_no_id_and_no_texts_in_whichever_order_stand_in_two_rows(stem: str) -> None:
    found = [row for split in SPLITS for row in rows(f"{stem}-{split}.csv")]
    assert len({frozenset(texts(row)) for row in found}) == len({row["id"] for row in found}) == len(found)
    assert all(re.fullmatch(r"[0-9a-f]{25}", row["id"]) for row in found)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_all_labels_are_present_and_mildly_unbalanced(split: str) -> None:
    sentiments, are_duplicate, similarities = (
        [row[COLUMNS[stem].split()[-1]] for row in rows(f"{stem}-{split}.csv")] for stem in NUM_ROWS
    )
    counts = Counter(sentiments)
    assert sorted(counts) == ["0", "1", "2", "3", "4"]
    assert all(0.10 < count / len(sentiments) < 0.32 for count in counts.values())
    assert max(counts.values()) > 1.4 * min(counts.values())
    assert set(are_duplicate) == {"0.0", "1.0"}
    assert 0.37 <= are_duplicate.count("1.0") / len(are_duplicate) <= 0.45
    assert set(similarities) <= {f"{step / 5:.1f}" for step in range(26)}
    whole_parts = Counter(min(int(float(similarity)), 4) for similarity in similarities)
    assert all(whole_parts[part] > 0.08 * len(similarities) for part in range(5))


ALL_TEXTS = [text for name in FILES for row in rows(name) for text in texts(row)]


@pytest.mark.parametrize(
    "fault",
    [
        *(r"\s\s|^\s|\s$", r"\s[.,;?]", r"[.,;?]{2}", r"[{}|*=_]", r"\b[Aa] [aeioAEIO]", r"\b[Aa]n [^aeiouhAEIOH]"),
        *(r"(?i)\b(\w+) \1\b", r"^[^A-Z0-9]", r"[.?] [a-z]", r"[^.?]$", r"\bNone\b", r'["\t]'),
    ],
)
def test_texts_are_free_of(fault: str) -> None:
    assert [text for text in ALL_TEXTS if re.search(fault, text)] == []


def test_texts_have_the_length_of_a_sentence_and_starred_words_appear_in_dev_and_never_in_train() -> None:
    lengths = [len(text.split()) for text in ALL_TEXTS]
    assert min(lengths) >= 3 and max(lengths) <= 25 and 8 <= sum(lengths) / len(lengths) <= 14
    starred = [word[1:] for words in REVIEWS["grades"].values() for word in words if word.startswith("*")]
    train, dev = (" ".join(" ".join(texts(row)) for row in rows(f"ids-sst-{split}.csv")) for split in ("train", "dev"))
    assert [word for word in starred if re.search(rf"\b{word}\b", train)] == []
    assert [word for word in starred if not re.search(rf"\b{word}\b", dev)] == []


def test_contrasts_have_their_mirror_images_wordings_all_that_their_topics_name_and_actions_their_forms() -> None:
    contrasts = {tuple(map(int, contrast)) for contrast in REVIEWS["contrasts"]}
    assert {tuple(4 - label for label in contrast) for contrast in contrasts} == contrasts
    names = [name for scene in STATEMENTS["scenes"] for entry in scene["core"]["action"] for name in entry.split("=")]
    assert all(len(name.split()) in (3, 4) and name.split()[1].endswith("ing") for name in names)
    for topic in QUESTIONS["topics"]:
        for intent in topic["intents"]:
            slots = [{name for name in re.findall(r"\{([^{}]+)\}", wording) if "|" not in name} for wording in intent]
            assert all(found == set(topic["slots"]) for found in slots), intent
            assert sum(wording[0] != "*" for wording in intent) >= 2  # train can reword every intent


def test_groups_have_the_keys_that_are_read_and_every_table_of_words_is_used() -> None:
    keys = {
        "domains": {"unseen", "items", "maker", "earlier", "aspects", "verdicts", "contexts"},
        "topics": {"unseen", "slots", "order", "intents"},
        "scenes": {"unseen", "told_as", "reversible", "core", "numbers", "details"},
    }
    groups = {"domains": REVIEWS["domains"], "topics": QUESTIONS["topics"], "scenes": STATEMENTS["scenes"]}
    assert {name: {key for group in found for key in group} for name, found in groups.items()} == keys
    tables = [topic["slots"] for topic in groups["topics"]]
    tables += [scene[part] for scene in groups["scenes"] for part in ("core", "numbers", "details")]
    used = {words for table in tables for words in table.values() if isinstance(words, str)}
    assert used == set(QUESTIONS["words"])


def test_reversed_roles_are_less_similar_than_a_changed_place_and_a_number_counts_for_its_agent_only() -> None:
    dogs = {"agent": "dog", "action": "chase", "patient": "cow", "agent_count": "two"}
    assert make_sample.common_share(dogs, dogs | {"agent": "cat"}, STATEMENTS) == pytest.approx(7 / 11)
    told = {"agent": "dog", "action": "chase", "patient": "cat", "place": "in a field"}
    reversed_roles = told | {"agent": "cat", "patient": "dog"}
    same, exchanged, elsewhere = (
        make_sample.common_share(told, other, STATEMENTS)
        for other in (told, reversed_roles, told | {"place": "by the river"})
    )
    assert same == 1 and exchanged < 0.6 < elsewhere < 1


@pytest.mark.parametrize(
    ("task", "at_least", "at_most"), [("sst", 0.40, 0.55), ("para", 0.64, 0.75), ("sts", 0.50, 0.70)]
)
def test_counting_words_beats_chance_and_stays_far_from_the_ceiling(task: str, at_least: float, at_most: float) -> None:
    with threadpool_limits(1):  # threads wait for each other longer than these small products take
        scores = bag_of_words_scores(SAMPLE, TASKS[task])
    assert at_least < scores["bag of words"] < at_most
    assert scores["bag of words"] > scores.get("majority class", 0) + 0.05
