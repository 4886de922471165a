"""Soups: the mean of the parameters of checkpoints (Wortsman et al. 2022, arXiv 2203.05482).

It is worth something where the checkpoints began at the same weights, such as runs of one model with other flags.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert import CheckpointError
from checkpoints import checkpoint_folder, load_model, read_bert_config, read_layout
from datasets import Tokenizer
from evaluation import format_scores, mean_score
from model import Layout, MultitaskBert

Metrics = Mapping[str, Mapping[str, float]]  # of each task


def check_ingredients(checkpoints: Sequence[str], tasks: Sequence[str]) -> None:
    """Raises CheckpointError, one line, if one of the directories is no checkpoint, has no head of one of the tasks, is
    named twice, or differs from the first in encoder, layout or vocabulary."""
    folders = [checkpoint_folder(Path(name)) for name in checkpoints]
    if len(set(folders)) < len(folders):
        raise CheckpointError(f"--checkpoints {' '.join(checkpoints)}: expected each checkpoint once")
    first, expected = checkpoints[0], _description(folders[0], tasks)
    for other, folder in zip(checkpoints[1:], folders[1:], strict=True):
        found = _description(folder, tasks)
        for key in {**expected, **found}:
            if expected.get(key) != found.get(key):
                raise CheckpointError(
                    f"--checkpoints {first} {other}: {key} is {expected.get(key)} in the one and {found.get(key)} in "
                    "the other, expected checkpoints of one layout"
                )


def _description(folder: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """All that has to be equal in two checkpoints for a mean of them to make sense."""
    encoder, layout = read_bert_config(folder), read_layout(folder) or Layout({})
    if missing := [task for task in tasks if task not in layout.tasks]:
        raise CheckpointError(f"{folder}: no head of {', '.join(missing)}, expected one of each of --tasks")
    vocabulary = Tokenizer(folder, encoder.num_positions).fingerprint()[:12]
    of_encoder = {"model_type": encoder.model_type, **asdict(encoder)}
    return dict(_flat({**of_encoder, "checksum of the vocabulary": vocabulary, **layout.to_dict()}))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield from _flat(value, f"{prefix}{key} ") if isinstance(value, Mapping) else [(prefix + key, value)]


def mean_state(folders: Sequence[Path], layout: Layout) -> dict[str, Tensor]:
    """By name the mean of the checkpoints' parameters, summed in float64, one checkpoint in memory at a time."""
    sums: dict[str, Tensor] = {}
    for folder in folders:
        for name, value in load_model(folder, layout, torch.Generator()).model.state_dict().items():
            sums[name] = sums[name] + value if name in sums else value.double()
    return {name: total / len(folders) for name, total in sums.items()}


def greedy_soup(scores: Sequence[float], score_with: Callable[[list[int]], float]) -> list[int]:
    """Numbers of the ingredients that are kept, in the order in which they were added (the paper's recipe 1).

    scores: of each alone. From the best down each is added, and stays if the score of the mean does not fall.
    """
    first, *others = sorted(range(len(scores)), key=lambda number: -scores[number])
    kept, best = [first], scores[first]
    for number in others:
        if (score := score_with([*kept, number])) >= best:
            kept, best = [*kept, number], score
    return kept


def cook(
    model: MultitaskBert,
    checkpoints: Sequence[str],
    is_greedy: bool,
    evaluate: Callable[[], Metrics],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Gives the model the mean of the checkpoints' parameters, or of those that the greedy recipe keeps.

    evaluate: dev metrics of the model as it is. Returns of each checkpoint, for results.json, its name, its dev scores
    and whether it is in the mean.
    """

    def mix(numbers: Sequence[int]) -> None:
        folders = [checkpoint_folder(Path(checkpoints[number])) for number in numbers]
        model.load_state_dict(mean_state(folders, model.layout))

    def score_with(numbers: list[int]) -> float:
        mix(numbers)
        metrics = evaluate()
        say(f"soup with {checkpoints[numbers[-1]]}: dev {format_scores(metrics)}")
        return mean_score(metrics)

    alone = []
    for number, name in enumerate(checkpoints):
        mix([number])
        alone.append(evaluate())
        say(f"{name}: dev {format_scores(alone[-1])}")
    kept = list(range(len(checkpoints)))
    if is_greedy:
        kept = greedy_soup([mean_score(metrics) for metrics in alone], score_with)
    mix(kept)
    names = [checkpoints[number] for number in kept]
    say(f"soup: mean of {len(kept)} of {len(checkpoints)} checkpoints: {' '.join(names)}")
    return [
        {"checkpoint": name, "dev": {**metrics, "mean": mean_score(metrics)}, "kept": number in kept}
        for number, (name, metrics) in enumerate(zip(checkpoints, alone, strict=True))
    ]
