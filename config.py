"""The command line: every flag is declared once, as a field of `Config` with its default, help and limits.

`parse` reads the flags and reports every contradiction at once, before anything is loaded.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from bert import EMBEDDED_MODEL
from pal import KINDS
from pcgrad import TREATMENTS, gramian_weightings
from schedulers import SCHEDULERS
from tasks import TASKS

OPTIONS = ("finetune", "pretrain", "individual_pretrain", "test", "predict")
PREDICT_FLAGS = (
    "option", "checkpoint", "task", "input", "output", "eval_batch_size", "max_length", "device", "threads", "amp"
)  # fmt: skip
DRAWS_WITH_TREATMENT = 16  # with --scheduler pal; the other schedulers draw each task once


class FlagError(ValueError):
    """Flags that make no sense; one problem a line."""


def flag(default: Any, help: str, limits: str = "", **options: Any) -> Any:
    """A field that is a flag. limits: as in "> 0", "0 <= x < 1", checked and named in the error."""
    return field(default=default, metadata={"help": help, "limits": limits, "options": options})


@dataclass(frozen=True)
class Config:
    """All settings of a run, as given."""

    option: str = flag("finetune", "which stages to run", choices=OPTIONS)
    tasks: tuple[str, ...] = flag(
        tuple(TASKS), "tasks to train together; one is single-task training", choices=tuple(TASKS), nargs="+"
    )
    model: str = flag(EMBEDDED_MODEL, "minilm (embedded), a hub name such as bert-base-uncased, or a directory")
    data: str = flag("sample", "sample (the project's own) or a directory with CS224N's files")
    out: str = flag("", "run directory to make; default runs/<time>-<option>", metavar="DIR")
    resume: str = flag("", "run directory to continue; takes all other flags from it", metavar="DIR")
    checkpoint: str = flag("", "run directory or checkpoint folder to start from", metavar="DIR")

    task: str = flag("", "predict: what to predict; sst reads sentences, para and sts pairs", choices=tuple(TASKS))
    input: str = flag(
        "-",
        "predict: file with a sentence or tab-separated pair a line, not quoted; - is standard input",
        metavar="FILE",
    )
    output: str = flag(
        "-",
        "predict: file to make; - is standard output. No header; for each line of the input a line: the class and, "
        "behind a tab, its probability, or for sts the score alone. A broken line, named on standard error, leaves its "
        "line empty but for the tab, and the exit status is 1",
        metavar="FILE",
    )

    scheduler: str = flag("pal", "how tasks are drawn", choices=tuple(SCHEDULERS))
    draws_per_step: int = flag(
        0, f"draws of one optimizer step; 0: 1, with a treatment one a task, {DRAWS_WITH_TREATMENT} with pal", ">= 0"
    )
    treatment: str = flag(
        "sum",
        f"how task gradients become one: {', '.join(TREATMENTS)}, or a Gramian weighting of torchjd by its name",
        metavar="NAME",
    )
    pcgrad: bool = flag(False, "short for --treatment pcgrad")
    gradvac: bool = flag(False, "short for --treatment gradvac")
    gradvac_beta: float = flag(0.01, "how far a step moves Gradient Vaccine's target cosines", "0 < x <= 1")
    granularity: str = flag(
        "model", "treat gradients over the whole model, or over each layer on its own", choices=("model", "layer")
    )
    smart: bool = flag(False, "SMART's smoothness-inducing regularization in fine-tuning")
    smart_weight: float = flag(1.0, "factor of the smoothness term (lambda)", "> 0")
    smart_eps: float = flag(1e-5, "largest perturbation of an embedding's coordinate", "> 0")
    smart_sigma: float = flag(1e-5, "standard deviation of the perturbation's start", "> 0")
    smart_eta: float = flag(1e-3, "step size of the perturbation's ascent", "> 0")
    smart_steps: int = flag(1, "ascent steps", ">= 1")
    bregman: bool = flag(False, "SMART's Bregman proximal point term in fine-tuning")
    bregman_weight: float = flag(1.0, "factor of the proximal term (mu)", "> 0")
    pal: bool = flag(False, "projected attention layers: a small adapter of each task in the encoder's layers")
    pal_kind: str = flag(
        "attention", "attention: projections shared by the layers; low_rank: a bottleneck in each layer", choices=KINDS
    )
    pal_size: int = flag(0, "width of the adapters; 0: the paper's proportion to the hidden size", ">= 0")
    pal_heads: int = flag(0, "heads of an adapter's attention; 0: one for every 64 of the hidden size", ">= 0")
    pal_layers: int = flag(0, "adapters in that many top layers; 0: in all", ">= 0")
    train: str = flag(
        "all", "what fine-tuning trains; pal: the adapters, everything else frozen", choices=("all", "pal")
    )
    head_layers: int = flag(0, "hidden layers in each task's head", ">= 0")

    augment: str = flag("none", "eda: fill up rarer classes of sst and para with edited rows", choices=("none", "eda"))
    eda_alpha: float = flag(0.1, "share of a text's words that an edit changes", "0 < x <= 1")
    eda_deletion_prob: float = flag(0.1, "probability of a word to be deleted", "0 < x < 1")
    wordnet: str = flag("", "directory of a WordNet database; default: nltk's or the system's", metavar="DIR")
    drop_longest: float = flag(
        0.0, "share of each task's longest training rows to leave out, such as 0.02", "0 <= x < 1"
    )
    cache: str = flag(
        "", "directory of tokenized files for later runs; default .cache beside the run, off: none", metavar="DIR"
    )
    max_length: int = flag(0, "tokens of a row at most; 0: as many as the model has positions", ">= 0")

    epochs: int = flag(5, "epochs of fine-tuning", ">= 1")
    pretrain_epochs: int = flag(10, "epochs of training the heads on the frozen encoder; 0: none", ">= 0")
    steps_per_epoch: int = flag(
        0, "optimizer steps of an epoch; 0: as many as see as many rows as the training files hold", ">= 0"
    )
    batch_size: int = flag(32, "rows of one forward pass", ">= 1")
    accumulation_steps: int = flag(1, "forward passes of one draw", ">= 1")
    eval_batch_size: int = flag(64, "rows of one forward pass in evaluation", ">= 1")
    eval_every: int = flag(1, "epochs between evaluations; 0: after the last only", ">= 0")
    save_every: int = flag(0, "steps between checkpoints; 0: at each epoch's end", ">= 0")
    lr: float = flag(0.0, "peak learning rate of fine-tuning; 0: by the model's width and the draws of a step", ">= 0")
    pretrain_lr: float = flag(1e-3, "peak learning rate of the frozen stage", "> 0")
    warmup: float = flag(0.1, "share of the steps in which the learning rate rises", "0 <= x < 1")
    weight_decay: float = flag(0.01, "AdamW's weight decay, not for biases and LayerNorms", ">= 0")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: never", ">= 0")
    patience: int = flag(0, "epochs without a gain after which a stage ends; 0: never", ">= 0")
    seed: int = flag(0, "seed of everything that is random", ">= 0")
    threads: int = flag(0, "CPU threads; 0: torch's default", ">= 0")
    device: str = flag("auto", "auto takes CUDA where there is a GPU", choices=("auto", "cpu", "cuda"))
    amp: str = flag(
        "off",
        "mixed precision: bf16 (also the bare flag) or fp16",
        choices=("off", "bf16", "fp16"),
        nargs="?",
        const="bf16",
    )
    tensorboard: bool = flag(True, "write TensorBoard files too")

    @property
    def draws(self) -> int:
        """Draws of an optimizer step in fine-tuning."""
        if self.draws_per_step:
            return self.draws_per_step
        if self.treatment == "sum":
            return 1
        return DRAWS_WITH_TREATMENT if self.scheduler == "pal" else len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tasks": list(self.tasks)}


_BRACKETS: Mapping[str, Callable[[float], bool]] = {
    "": lambda x: True,
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    ">= 1": lambda x: x >= 1,
    "0 < x <= 1": lambda x: 0 < x <= 1,
    "0 < x < 1": lambda x: 0 < x < 1,
    "0 <= x < 1": lambda x: 0 <= x < 1,
}
_IN_WORDS = {
    "> 0": "a number above 0",
    ">= 0": "0 or more",
    ">= 1": "1 or more",
    "0 < x <= 1": "a number above 0 and at most 1",
    "0 < x < 1": "a number above 0 and below 1",
    "0 <= x < 1": "a number from 0 to below 1",
}


class _Parser(argparse.ArgumentParser):
    """One line for a wrong command line, without the usage of sixty flags."""

    def error(self, message: str) -> Any:
        raise FlagError(message.replace("argument ", "", 1))


def make_parser() -> argparse.ArgumentParser:
    """argparse's parser of all fields. Flags that are not given stay absent from its result."""
    parser = _Parser(
        prog="multitask_classifier.py",
        description="Trains one BERT for sentiment, paraphrase and similarity together.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for item in fields(Config):
        default = item.default
        assert default is not MISSING
        options = dict(item.metadata["options"])
        shown = " ".join(default) if isinstance(default, tuple) else default
        help = item.metadata["help"] + (f" (default {shown})" if shown not in ("", False) else "")
        help = help.replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(f"--{item.name}", action=argparse.BooleanOptionalAction, help=help)
        else:
            kind = str if isinstance(default, tuple) else type(default)
            parser.add_argument(f"--{item.name}", type=kind, help=help, **options)
    return parser


def parse(arguments: Sequence[str]) -> Config:
    """The settings of a command line. Raises FlagError with all problems, one a line."""
    given = vars(make_parser().parse_args(arguments))
    if "tasks" in given:
        given["tasks"] = tuple(given["tasks"])
    problems = [*_out_of_limits(given), *_contradictions(given)]
    if problems:
        raise FlagError("\n".join(problems))
    for name in ("pcgrad", "gradvac"):
        if given.get(name):
            given["treatment"] = name
    return Config(**given)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The settings that a run directory's config.json holds."""
    known = {item.name for item in fields(Config)}
    return Config(**{**{k: v for k, v in values.items() if k in known}, "tasks": tuple(values["tasks"])})


def _out_of_limits(given: Mapping[str, Any]) -> list[str]:
    problems = []
    for item in fields(Config):
        limits = item.metadata["limits"]
        value = given.get(item.name)
        if value is not None and limits and not (math.isfinite(value) and _BRACKETS[limits](value)):
            problems.append(f"--{item.name} {value}: expected {_IN_WORDS[limits]}")
    if 0 < given.get("max_length", 0) < 5:
        problems.append(f"--max_length {given['max_length']}: expected 0, or 5 or more: [CLS] a [SEP] b [SEP]")
    tasks = given.get("tasks", ())
    if len(set(tasks)) != len(tasks):
        problems.append(f"--tasks {' '.join(tasks)}: expected each task once")
    return problems


def _contradictions(given: Mapping[str, Any]) -> list[str]:
    """Every combination of flags that would silently do nothing, or cannot be done."""
    config = Config(**given)
    chosen = [name for name in ("pcgrad", "gradvac") if given.get(name)]
    treatment = chosen[0] if chosen else config.treatment
    is_treated = treatment != "sum"
    problems: list[str] = []

    def needs(names: Sequence[str], condition: bool, reason: str) -> None:
        problems.extend(f"--{name}: {reason}" for name in names if name in given and not condition)

    if config.resume:
        others = [name for name in given if name not in ("resume", "device", "threads")]
        problems.extend(f"--{name}: --resume takes it from the run; leave it out" for name in others)
        return problems
    if config.option == "predict":
        return _contradictions_of_predict(config, given)
    needs(["task", "input", "output"], False, "expected only with --option predict")
    if len(chosen) == 2 or (chosen and "treatment" in given and config.treatment != chosen[0]):
        problems.append("--pcgrad, --gradvac, --treatment: they name different treatments, expected one")
    if treatment not in TREATMENTS and treatment not in (known := gramian_weightings()):
        problems.append(
            f"--treatment {treatment}: expected one of {', '.join(TREATMENTS)}"
            + (f", or torchjd's {', '.join(known)}" if known else ", or with torchjd installed one of its weightings")
        )
    trains = config.option != "test"
    full = config.option == "finetune"
    sizes = [name for name in given if name.startswith("pal_")]
    needs(["gradvac_beta"], treatment == "gradvac", "expected only with --gradvac")
    needs(["granularity"], is_treated, "expected only with a gradient treatment (--pcgrad, --gradvac, --treatment)")
    needs([n for n in given if n.startswith("smart_")], config.smart, "expected only with --smart")
    needs(["bregman_weight"], config.bregman, "expected only with --bregman")
    needs(sizes, config.pal, "expected only with --pal")
    needs(
        [n for n in given if n.startswith("eda_")] + ["wordnet"],
        config.augment == "eda",
        "expected only with --augment eda",
    )
    tuning = ["smart", "bregman", "pal", "train", "epochs", "lr", "draws_per_step"]
    needs(
        [n for n in tuning if given.get(n)],
        full,
        f"--option {config.option} does not fine-tune, expected only with finetune",
    )
    if is_treated and not full:
        problems.append(f"--treatment {treatment}: --option {config.option} shares no trained parameters between tasks")
    needs(
        [
            "augment",
            "drop_longest",
            "steps_per_epoch",
            "accumulation_steps",
            "warmup",
            "weight_decay",
            "patience",
            "pretrain_epochs",
            "pretrain_lr",
            "scheduler",
            "save_every",
            "max_grad_norm",
        ],
        trains,
        "--option test does not train",
    )
    needs(["scheduler"], config.option != "individual_pretrain", "individual_pretrain trains one task at a time")
    if config.option == "test" and not config.checkpoint:
        problems.append("--option test: expected --checkpoint DIR")
    if config.option in ("pretrain", "individual_pretrain") and config.pretrain_epochs == 0:
        problems.append(f"--pretrain_epochs 0: --option {config.option} would do nothing")
    if full and config.checkpoint and given.get("pretrain_epochs"):
        problems.append("--pretrain_epochs: --checkpoint has trained heads, the frozen stage is skipped")
    needs(
        ["pretrain_lr"], not (full and (config.checkpoint or config.pretrain_epochs == 0)), "there is no frozen stage"
    )
    if config.checkpoint and "model" in given:
        problems.append("--model, --checkpoint: the checkpoint holds the encoder, expected one of them")
    if config.train == "pal":
        if not config.pal:
            problems.append("--train pal: expected with --pal")
        if is_treated:
            problems.append(f"--train pal: adapters are each task's own, --treatment {treatment} would do nothing")
    if is_treated and config.draws_per_step and config.draws_per_step < len(config.tasks):
        problems.append(
            f"--draws_per_step {config.draws_per_step}: a treatment takes every task in every step, "
            f"expected at least {len(config.tasks)}"
        )
    if is_treated and len(config.tasks) == 1:
        problems.append(
            f"--treatment {treatment}: one task has no other to conflict with, expected two --tasks or more"
        )
    if (
        is_treated
        and config.scheduler == "pal"
        and len(config.tasks) > 1
        and config.draws_per_step == len(config.tasks)
    ):
        problems.append(
            f"--draws_per_step {config.draws_per_step}: with every task exactly once in every step --scheduler pal "
            f"would do nothing, expected more than {len(config.tasks)} or --scheduler round_robin"
        )
    if config.patience and config.eval_every == 0:
        problems.append(f"--patience {config.patience}: --eval_every 0 never evaluates before the last epoch")
    if "scheduler" in given and len(config.tasks) == 1:
        problems.append(f"--scheduler {config.scheduler}: there is one task to schedule, expected two --tasks or more")
    return problems


def _contradictions_of_predict(config: Config, given: Mapping[str, Any]) -> list[str]:
    others = [name for name in given if name not in PREDICT_FLAGS]
    problems = [f"--{name}: --option predict does not use it; leave it out" for name in others]
    if not config.checkpoint:
        problems.append("--option predict: expected --checkpoint DIR")
    if not config.task:
        problems.append(f"--option predict: expected --task, one of {', '.join(TASKS)}")
    return problems
