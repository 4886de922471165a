"""Scores of models that only count words, on the dev files of a data folder.

    python data/bag_of_words.py DIR

What such a model reaches needs no understanding of order, negation or roles: a trained encoder is worth its cost by
what it adds to these numbers. Settings are chosen on the dev files themselves, in favour of the counting.
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import MaxAbsScaler

Texts = Sequence[str]
Labels = NDArray[np.float64]
Score = Callable[[Labels, Labels], float]

INVERSE_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)
NGRAMS = ((1, 1), (1, 2))


def read_columns(path: Path, text_columns: Sequence[str], label_column: str) -> tuple[list[list[str]], Labels]:
    """One list per text column, and the labels. A row without a label is left out: the real Quora file has two.

    Raises ValueError if a column is missing.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t")
        for column in (*text_columns, label_column):
            if column not in (reader.fieldnames or ()):
                raise ValueError(f"{path}: no column {column!r}, only {reader.fieldnames}; is it a file of CS224N?")
        rows = [row for row in reader if row[label_column]]
    texts = [[row[column] for row in rows] for column in text_columns]
    return texts, np.array([float(row[label_column]) for row in rows])


def accuracy(predictions: Labels, labels: Labels) -> float:
    return float(np.mean(predictions == labels))


def pearson(predictions: Labels, labels: Labels) -> float:
    return float(np.corrcoef(predictions, labels)[0, 1])


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


def pair_features(vectorizer: TfidfVectorizer, texts: Sequence[Texts]) -> csr_matrix:
    """Overlap, difference and product of two texts' word weights."""
    first, second = (vectorizer.transform(column) for column in texts)
    return hstack([overlap_features(first, second), abs(first - second), first.multiply(second)]).tocsr()


def features(train: Sequence[Texts], dev: Sequence[Texts], ngrams: tuple[int, int]) -> tuple[csr_matrix, csr_matrix]:
    """Features of train and dev rows; the vocabulary and the scales are those of train."""
    vectorizer = TfidfVectorizer(ngram_range=ngrams, sublinear_tf=True, token_pattern=r"\b\w+\b")
    vectorizer.fit([text for column in train for text in column])
    if len(train) == 1:
        return vectorizer.transform(train[0]), vectorizer.transform(dev[0])
    scaler = MaxAbsScaler().fit(pair_features(vectorizer, train))
    return scaler.transform(pair_features(vectorizer, train)), scaler.transform(pair_features(vectorizer, dev))


def best_score(
    model: Callable[[float], LogisticRegression | Ridge],
    score: Score,
    train: tuple[Sequence[Texts], Labels],
    dev: tuple[Sequence[Texts], Labels],
) -> float:
    """The best dev score over n-gram lengths and penalties."""
    scores = []
    for ngrams in NGRAMS:
        train_features, dev_features = features(train[0], dev[0], ngrams)
        for inverse_penalty in INVERSE_PENALTIES:
            fitted = model(inverse_penalty).fit(train_features, train[1])
            scores.append(score(fitted.predict(dev_features), dev[1]))
    return max(scores)


def majority_accuracy(train_labels: Labels, dev_labels: Labels) -> float:
    classes, counts = np.unique(train_labels, return_counts=True)
    return float(np.mean(dev_labels == classes[counts.argmax()]))


def classifier(inverse_penalty: float) -> LogisticRegression:
    return LogisticRegression(C=inverse_penalty, max_iter=300)


def regressor(inverse_penalty: float) -> Ridge:
    return Ridge(alpha=1 / inverse_penalty)


def bag_of_words_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Task -> score of the counting model and, for the classes, of always answering the most frequent one."""
    scores = {}
    for task, stem, text_columns, label_column in (
        ("sst", "ids-sst", ("sentence",), "sentiment"),
        ("para", "quora", ("sentence1", "sentence2"), "is_duplicate"),
        ("sts", "sts", ("sentence1", "sentence2"), "similarity"),
    ):
        train = read_columns(folder / f"{stem}-train.csv", text_columns, label_column)
        dev = read_columns(folder / f"{stem}-dev.csv", text_columns, label_column)
        if task == "sts":
            scores[task] = {"bag of words": best_score(regressor, pearson, train, dev)}
        else:
            scores[task] = {
                "bag of words": best_score(classifier, accuracy, train, dev),
                "majority class": majority_accuracy(train[1], dev[1]),
            }
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what models that only count words reach on the dev files.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with CS224N's files")
    folder = parser.parse_args().folder
    try:
        scores = bag_of_words_scores(folder)
    except FileNotFoundError as error:
        parser.error(f"{error.filename}: no such file; DIR must hold ids-sst, quora and sts files, train and dev")
    except ValueError as error:
        parser.error(str(error))
    for task, named in scores.items():
        metric = "Pearson r" if task == "sts" else "accuracy"
        print(f"{task:5}{metric:10}", *(f"{name} {value:.3f}" for name, value in named.items()), sep="  ")


if __name__ == "__main__":
    main()
