"""What is told beside the scores: what guessing gives, one answer throughout, fine-tuning that did not help."""

from typing import Any

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier

from remarks import guess_scores, remarks

CONFUSION = {"sst": np.diag([3, 9, 4, 1, 2]), "para": [[30, 0], [12, 0]]}
SCORES = {
    "sst": {"accuracy": 1.0, "macro_f1": 1.0},
    "para": {"accuracy": 0.7, "macro_f1": 0.4},
    "sts": {"pearson": 0.5, "spearman": 0.6},
}


def epochs(stage: str, *means: float | None) -> list[dict[str, Any]]:
    """Records of a stage: a step, and an evaluation for each of the means."""
    dev = [{"stage": stage, "epoch": i, "step": i, "dev": {"mean": mean}} for i, mean in enumerate(means)]
    return [{"stage": stage, "epoch": 0, "step": 0, "loss": 1.0}, *dev]


def test_guessing_scores_what_a_classifier_that_knows_no_texts_scores() -> None:
    labels = np.repeat(np.arange(5), [3, 9, 4, 1, 2])
    guess = DummyClassifier(strategy="most_frequent").fit(labels[:, None], labels)
    expected = {"sst": guess.score(labels[:, None], labels), "para": 30 / 42, "sts": 0.0}
    assert guess_scores(["sst", "para", "sts"], CONFUSION) == pytest.approx(expected)
    assert guess_scores(["sst", "para"], {"para": [[0, 0], [0, 0]]}) == {"para": 0.0}


def test_one_answer_throughout_is_remarked_by_task_and_name() -> None:
    assert remarks(SCORES, CONFUSION, []) == ["warning: para: one class predicted throughout (no)"]
    assert remarks(SCORES, {"para": [[0, 3], [0, 0]]}, []) == ["warning: para: one class predicted throughout (yes)"]
    (line,) = remarks({**SCORES, "sts": {"pearson": 0.0}}, {}, [])
    assert line.startswith("warning: sts: one number predicted throughout") and "counts as 0" in line


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (epochs("pretrain", 0.3, 0.5) + epochs("finetune", 0.4, 0.499), "(best means 0.4990 and 0.5000;"),
        (epochs("pretrain", 0.3, 0.5) + epochs("finetune", 0.5, 0.1), None),
        (epochs("pretrain", 0.5) + epochs("finetune", None), None),
        (epochs("pretrain", 0.5) + epochs("finetune"), None),
        (epochs("finetune", 0.1), None),
        (epochs("pretrain_sst", 0.9) + epochs("pretrain_para", 0.1), None),
    ],
)
def test_fine_tuning_below_its_frozen_stage_is_remarked(records: list[dict[str, Any]], words: str | None) -> None:
    found = remarks({}, {}, records)
    assert len(found) == (words is not None) and all(str(words) in line for line in found)
