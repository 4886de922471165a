"""Scores of models that only count words, on the dev files of a data folder.

    python data/bag_of_words.py DIR

What such a model reaches needs no understanding of order, negation or roles: a trained encoder is worth its cost by
what it adds to these numbers. Settings are chosen on the dev files themselves, in favour of the counting.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import MaxAbsScaler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import DataError, Example, data_folder, read_examples
from tasks import TASKS, Task

INVERSE_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)
NGRAMS = ((1, 1), (1, 2))


def overlap_features(first: csr_matrix, second: csr_matrix) -> csr_matrix:
    """How much of two texts is the same: weighted overlap, shares of either side, sizes.  (rows, 6)"""
    shared, either = first.minimum(second).sum(axis=1), first.maximum(second).sum(axis=1)
    sizes = first.sum(axis=1), second.sum(axis=1)
    columns = [
        first.multiply(second).sum(axis=1),
        shared / np.maximum(either, 1e-9),
        *sizes,
        abs(sizes[0] - sizes[1]),
        shared / np.maximum(np.minimum(*sizes), 1e-9),
    ]
    return csr_matrix(np.hstack([np.asarray(column).reshape(-1, 1) for column in columns]))


def features(vectorizer: TfidfVectorizer, examples: Sequence[Example]) -> csr_matrix:
    """The words' weights; of a pair overlap, difference and product of two texts' weights."""
    columns = [vectorizer.transform(texts) for texts in zip(*(example.texts for example in examples), strict=True)]
    if len(columns) == 1:
        return columns[0]
    first, second = columns
    return hstack([overlap_features(first, second), abs(first - second), first.multiply(second)]).tocsr()


def bag_of_words_scores(folder: Path, task: Task) -> dict[str, float]:
    """The best dev score over n-gram lengths and penalties and, for classes, of always the most frequent one."""
    train, dev = (read_examples(folder / task.file_name(split), task, True).examples for split in ("train", "dev"))
    labels, dev_labels = (np.array([example.label for example in examples]) for examples in (train, dev))
    is_scale = task.output.num_classes is None
    found = []
    for ngrams in NGRAMS:
        vectorizer = TfidfVectorizer(ngram_range=ngrams, sublinear_tf=True, token_pattern=r"\b\w+\b")
        vectorizer.fit([text for example in train for text in example.texts])
        scaler = MaxAbsScaler().fit(train_features := features(vectorizer, train))
        for penalty in INVERSE_PENALTIES:
            model = Ridge(alpha=1 / penalty) if is_scale else LogisticRegression(C=penalty, max_iter=300)
            model.fit(scaler.transform(train_features), labels)
            predictions = model.predict(scaler.transform(features(vectorizer, dev)))
            found.append(task.output.scores(predictions, dev_labels)[task.output.selection_metric])
    if is_scale:
        return {"bag of words": max(found)}
    majority = DummyClassifier().fit(labels, labels).score(dev_labels, dev_labels)
    return {"bag of words": max(found), "majority class": float(majority)}


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python data/bag_of_words.py DIR, a folder with CS224N's files", file=sys.stderr)
        return 2
    try:
        folder = data_folder(sys.argv[1], flag="")
        for task in TASKS.values():
            scores = bag_of_words_scores(folder, task)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
            print(f"{task.name:5}  {task.output.selection_metric:10}  {shown}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
