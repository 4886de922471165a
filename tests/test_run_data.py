"""The data of a run: what filtering and augmentation do to training rows, and that they do nothing to the others."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from config import parse
from datasets import TokenizedRows, Tokenizer, read_examples
from helpers import ROOT, THREE, Patch, write_data
from run_data import Data, load_data
from tasks import TASKS

pytestmark = pytest.mark.usefixtures("small_wordnet")


def load(data: Path, tiny: Path, flags: str = "", max_length: int = 64, is_siamese: bool = False) -> Data:
    config = parse(["--data", str(data), "--cache", "off", *flags.split()])
    return load_data(config, Tokenizer(tiny, max_length, is_siamese), torch.device("cpu"))


def content(rows: TokenizedRows) -> list[object]:
    return [
        rows.ids,
        np.nan_to_num(rows.labels, nan=-1).tolist(),
        *(np.asarray(part).tolist() for part in vars(rows.tokens).values()),
    ]


def test_classes_are_equal_in_number_after_filtering_and_augmentation(data: Path, tiny: Path) -> None:
    found = load(data, tiny, "--augment eda --drop_longest 0.2")
    for task in ("sst", "para"):
        counts = Counter(found.train[task].labels.tolist())
        assert len(set(counts.values())) == 1 and len(counts) == TASKS[task].output.num_classes
        added = found.files[TASKS[task].file_name("train")]["augmented_rows"]
        assert added == sum(name.startswith("eda") for name in found.train[task].ids) > 0
    assert "augmented_rows" not in found.files["sts-train.csv"]
    assert len(found.train["sts"]) == 26 - 5


@pytest.mark.parametrize("flags", ["--drop_longest 0.2", "--augment eda --drop_longest 0.2"])
def test_exactly_the_longest_rows_are_left_out(flags: str, data: Path, tiny: Path) -> None:
    whole, found = load(data, tiny), load(data, tiny, flags)
    for task in THREE:
        lengths = whole.train[task].tokens.lengths
        kept = [i for i in range(26) if (-lengths[i], -i) not in sorted((-n, -i) for i, n in enumerate(lengths))[:5]]
        names = [name for name in found.train[task].ids if not name.startswith("eda")]
        assert names == [whole.train[task].ids[i] for i in kept]
        record = found.files[TASKS[task].file_name("train")]
        assert (record["dropped_longest"], record["longest_tokens"]) == (5, max(lengths[kept]))
        assert any(f"the longest that stays has {max(lengths[kept])} tokens" in note for note in found.notes)


@pytest.mark.parametrize("is_siamese", [False, True])
def test_rows_are_as_long_as_before_truncation_where_the_longest_are_left_out(
    is_siamese: bool, data: Path, tiny: Path
) -> None:
    whole, found = (load(data, tiny, "--drop_longest 0.2", length, is_siamese) for length in (64, 6))
    for task in THREE:
        assert found.train[task].tokens.longest.max() == 6
        assert found.train[task].ids == whole.train[task].ids
        name = TASKS[task].file_name("train")
        assert found.files[name]["longest_tokens"] == whole.files[name]["longest_tokens"]


def test_dev_and_test_rows_stay_as_they_are(data: Path, tiny: Path) -> None:
    plain, changed = load(data, tiny), load(data, tiny, "--augment eda --drop_longest 0.5")
    for task in THREE:
        for split in ("dev", "test"):
            assert content(getattr(plain, split)[task]) == content(getattr(changed, split)[task])
        assert content(plain.train[task]) != content(changed.train[task])


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(data: Path, tiny: Path) -> None:
    flags = "--augment eda --drop_longest 0.02"
    first, again, other = (load(data, tiny, f"{flags} --seed {seed}") for seed in (1, 1, 2))
    for task in ("sst", "para"):
        assert content(first.train[task]) == content(again.train[task])
        assert content(first.train[task]) != content(other.train[task])


def test_edited_rows_are_rows_of_the_class_that_they_fill_up(data: Path, tiny: Path) -> None:
    found = load(data, tiny, "--augment eda --eda_alpha 0.1 --eda_deletion_prob 0.01").train["sst"]
    examples = read_examples(data / "ids-sst-train.csv", TASKS["sst"], labelled=True).examples
    offsets = np.cumsum([0, *found.tokens.lengths])
    rows = [found.tokens.ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    originals = dict(enumerate(rows[: len(examples)]))
    for number in range(len(examples), len(found)):
        label, words = found.labels[number], set(rows[number])
        sources = [
            i for i in originals if examples[i].label == label and len(words & set(originals[i])) >= len(words) - 1
        ]
        assert sources, f"row {number} is like no row of class {label}"


def test_of_many_rows_without_a_label_the_first_are_named(tmp_path: Path, tiny: Path) -> None:
    path = write_data(tmp_path) / "sts-train.csv"
    header, *rows = path.read_text().splitlines()
    unlabelled = [row.rsplit("\t", 1)[0] + "\t" for row in rows[:23]]
    path.write_text("\n".join([header, *unlabelled, *rows[23:]]) + "\n")
    (note,) = [note for note in load(tmp_path, tiny).notes if "without a label" in note]
    assert note.startswith(f"skipped 23 rows without a label: {path}:2, ") and note.endswith(f"{path}:21 and 3 more")


def test_a_leak_is_named_with_a_command_that_knows_the_task(tmp_path: Path, tiny: Path, monkeypatch: Patch) -> None:
    """Of a task whose definition came from a run there is none."""
    (tmp_path / "rows.csv").write_text("text,mood\na film,0.5\nanother,1\n")
    path = tmp_path / "own.toml"
    path.write_text(
        '[mood]\nfiles = { train = "rows.csv", dev = "rows.csv" }\ntexts = ["text"]\nlabel = "mood"\n'
        'kind = "score"\nrange = [0, 1]\n'
    )
    try:
        described = f"`python datasets.py {tmp_path} --task_file={path}` names them"
        for flags, end in ((f"--task_file {path}", described), ("", "stand in its training file too")):
            (note,) = load(tmp_path, tiny, f"--tasks mood {flags}").notes
            assert note.startswith("warning: 2 of 2 dev rows of mood stand in its") and note.endswith(end)
        monkeypatch.chdir(tmp_path)
        (note,) = load(tmp_path, tiny, f"--tasks mood --task_file {path}").notes
        assert f"`python {ROOT / 'datasets.py'} {tmp_path} " in note
    finally:
        TASKS.pop("mood", None)
