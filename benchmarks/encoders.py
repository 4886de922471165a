"""A training step of the other encoders against transformers' own, on the same padded batches."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import harness, workload
from benchmarks.harness import Check, Line, Options, Report, Summary
from benchmarks.reference import OrdinaryLoop, PaddedBert, predict_logits
from bert import BertConfig, empty_bert, initialize
from datasets import TokenizedRows
from evaluation import predict_all
from model import Layout, MultitaskBert
from modernbert import ModernBertConfig
from parameters import Choice
from roberta import RobertaConfig

SIZES: Mapping[str, Any] = {"num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 4, "pad_token_id": 1}
ENCODERS: Mapping[str, Callable[..., BertConfig]] = {"roberta": RobertaConfig, "modernbert": ModernBertConfig}
OURS, THEIRS = "{}, ours", "{}, transformers"
NUM_PREDICTED = 200


def encoders(options: Options) -> Report:
    """An optimizer step on 32 random rows of one task, the tasks in turn, with random weights, 6 layers 256 wide.

    The rows are those of the checkpoint's tokenizer, the very same on both sides, padded to the batch's longest on the
    other; the loop there is `training_step`'s.
    """
    checkpoint = workload.Checkpoint.find(options.model)
    rows = checkpoint.rows(options.data, "train")
    draws, predicted = workload.Draws(rows), workload.subset(rows, NUM_PREDICTED)
    kinds: dict[str, harness.Step] = {}
    checks = []
    for name, config in ENCODERS.items():
        model = random_model(config(**SIZES, intermediate_size=1024, vocab_size=checkpoint.config.vocab_size), rows)
        padded = PaddedBert(model)
        found = difference(model, padded, predicted)
        checks.append(Check(f"{name}: largest difference of two logits", found, 1e-4, must_hold=True))
        kinds[OURS.format(name)] = workload.step_of(workload.full_trainer(model, rows))
        kinds[THEIRS.format(name)] = partial(ordinary_step, OrdinaryLoop(padded, rows, workload.CPU), draws)
    seconds = harness.alternate(kinds, options.rounds)
    over = {n: Summary.of_ratios(seconds[THEIRS.format(n)], seconds[OURS.format(n)]) for n in ENCODERS}
    checks += [Check(f"{name}: our step over theirs", 1 / of.median, 1 / 1.8) for name, of in over.items()]
    ratios = {THEIRS.format(name): of for name, of in over.items()}
    lines = [Line(name, of, "s", ratios.get(name)) for name, of in seconds.items()]
    title = "seconds of an optimizer step on 32 rows; ratios to ours of the same encoder"
    return Report(title, lines, checks, (), {"rows": workload.row_counts(rows)})


def ordinary_step(loop: OrdinaryLoop, draws: workload.Draws, number: int) -> None:
    for draw in draws(number):
        loop.take_step(*draw)


def random_model(config: BertConfig, rows: Mapping[str, TokenizedRows]) -> MultitaskBert:
    """An encoder of random weights with linear heads."""
    generator = torch.Generator().manual_seed(workload.SEED)
    encoder = empty_bert(config)
    initialize(encoder, config.initializer_range, generator)
    return MultitaskBert(encoder, Layout(dict.fromkeys(rows, Choice("linear"))), generator)


def difference(model: MultitaskBert, padded: PaddedBert, rows: Mapping[str, TokenizedRows]) -> float:
    """The largest between two logits of one row."""
    ours = predict_all(model, rows, 64, workload.CPU)
    theirs = {task: predict_logits(padded.eval(), task, of, 64, workload.CPU) for task, of in rows.items()}
    return max(float((ours[task] - theirs[task]).abs().max()) for task in rows)
