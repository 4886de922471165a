"""The command line. A core flag is a field of `Config`; the flags of methods derive from the tables that hold them.

`parse` reads the flags and reports every contradiction at once, before anything is loaded.
"""

import argparse
import importlib.util
import inspect
import json
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.nn import ModuleDict

from bert import CheckpointError
from checkpoints import EMBEDDED_MODEL, checkpoint_folder, read_layout
from datasets import tasks_in
from eda import AUGMENTATIONS
from heads import HEADS, Reads
from jacobian_descent import METHODS, REFUSED, SCALARIZERS
from messages import COMMAND, command, shown
from model import PAIRS, POOLINGS, Layout
from pal import ADAPTERS
from parameters import Choice, Flag, NoParameters, flags_of, nearest, parameter, parameters_type
from pcgrad import TREATMENTS, find_treatment
from run_record import FORMATS, RECORD_KEYS, mismatch, read_file
from schedulers import SCHEDULERS
from smart import REGULARIZERS
from task_files import TaskFileError, add_saved_tasks, add_task_file
from tasks import TASKS
from trackers import TRACKERS

READS = ", ".join(f"{name} from {'a text' if len(of.text_columns) == 1 else 'a pair'}" for name, of in TASKS.items())
NO_TREATMENT = "sum"  # the tasks' gradients are added up
DRAWS_WITH_TREATMENT = 16
OPTIONS = {
    "finetune": "train the heads on the frozen encoder, then everything",
    "pretrain": "train the heads on the frozen encoder",
    "individual_pretrain": "the same, each task alone with its own best epoch",
    "test": "score a checkpoint and write its predictions",
    "soup": "average checkpoints, score the mean and write its predictions",
    "predict": "predict new texts",
    "export": "write a checkpoint as ONNX files for a phone, and prove them on the dev rows",
}
PREDICT_FLAGS = {
    *("option", "checkpoint", "task", "input", "output", "names"),
    *("eval_batch_size", "max_length", "device", "threads", "amp"),
}
EXPORT_FLAGS = {"option", "checkpoint", "out", "data", "max_length", "threads", "max_loss", "vocabulary"}
OWN_FLAGS = {"out", "resume", "config", "name", "task_file"}  # of a run, which another one does not take from it
RESUME_FLAGS = {"resume", "device", "threads"}

# Of each table of methods: its entries, and how one is chosen on the command line.
TABLES: dict[str, tuple[Mapping[str, Any], str]] = {
    "scheduler": (SCHEDULERS, "--scheduler {}"),
    "treatment": (TREATMENTS, "--{}"),
    "regularizer": (REGULARIZERS, "--{}"),
    "adapter": (ADAPTERS, "--{}"),
    "head": (HEADS, "--head {}"),
    "augment": (AUGMENTATIONS, "--augment {}"),
}


class FlagError(ValueError):
    """Flags that make no sense; each argument is a problem."""

    def __str__(self) -> str:
        return "\n".join(self.args)


def _treatments() -> list[str]:
    return [NO_TREATMENT, *TREATMENTS, *METHODS]


def _listed(choices: Mapping[str, str]) -> str:
    """The values of a flag, and what each is."""
    return "; ".join(f"{name}: {what}" for name, what in choices.items())


@dataclass(frozen=True)
class Config:
    """All settings of a run. What is 0 or empty is chosen automatically, until run.resolve has filled it in."""

    option: str = parameter("finetune", "\n".join(map(": ".join, OPTIONS.items())) + "\n", choices=OPTIONS)
    tasks: tuple[str, ...] = parameter((), "tasks to train together (default: those whose files are in --data)")
    task_file: tuple[str, ...] = parameter((), "TOML files with tasks of your own, which join --tasks", metavar="FILE")
    model: str = parameter(
        EMBEDDED_MODEL, "minilm (embedded), hub name or directory of a BERT, RoBERTa or ModernBERT", metavar="NAME"
    )
    data: str = parameter("sample", "sample (the project's own) or a directory with CS224N's files", metavar="DIR")
    out: str = parameter("", "run directory to make (default: runs/<time>-<option>)", metavar="DIR")
    config: str = parameter(
        "", "settings from a TOML file, or from a run's config.json; flags beside it win", metavar="FILE"
    )
    resume: str = parameter("", "run directory to continue; takes all other flags from it", metavar="DIR")
    checkpoint: str = parameter("", "run directory or checkpoint folder to start from", metavar="DIR")
    checkpoints: tuple[str, ...] = parameter((), "soup: run directories or checkpoint folders", metavar="DIR")
    soup: str = parameter(
        "uniform",
        "soup: uniform, the mean of all; greedy, from the best down of those that do not lower the dev mean",
        choices=("uniform", "greedy"),
    )

    task: str = parameter("", f"predict: what to predict; {READS}", metavar="TASK")
    input: str = parameter(
        "-",
        "predict: file with a sentence or tab-separated pair a line, not quoted; - is standard input",
        metavar="FILE",
    )
    output: str = parameter(
        "-",
        "predict: file to make; - is standard output. No header; for each line of the input a line: the number of the "
        "class, from 0, and, behind a tab, its probability, or for sts the score alone. A broken line, named on "
        "standard error, leaves its line empty but for the tab, and the exit status is 1",
        metavar="FILE",
    )
    names: bool = parameter(False, "predict: the name of the class too, behind another tab")
    max_loss: float = parameter(
        0.005, "export: of a task's dev score that model.int8.onnx may lose, and model.small.onnx twice", ">= 0"
    )
    vocabulary: str = parameter(
        "full",
        "export: word pieces of the tokenizer: full; data: those of the training texts, and single letters",
        choices=("full", "data"),
    )

    scheduler: str = parameter("pal", "how tasks are sampled: {}", metavar="NAME")
    draws_per_step: int = parameter(
        0,
        f"draws that share the rows of an optimizer step; 0: 1, with a treatment {DRAWS_WITH_TREATMENT} or, of fewer "
        "rows, as many as there are. With a treatment and as many draws as tasks each step holds every task once",
        ">= 0",
    )
    task_weights: tuple[str, ...] = parameter(
        (),
        "factors on the tasks' losses in fine-tuning, TASK=NUMBER; a task that is not named has 1, and all are divided "
        "by their mean",
        metavar="TASK=NUMBER",
    )
    treatment: str = parameter(
        NO_TREATMENT,
        f"how task gradients are aggregated: {NO_TREATMENT}, {{}}, or where torchjd is installed one of its methods: "
        + ", ".join(METHODS),
        metavar="NAME",
    )
    treatment_arguments: tuple[str, ...] = parameter(
        (),
        "arguments of a method of torchjd, as c=0.4, or for a vector one number a task: weights=1,2,0.5",
        metavar="X=Y",
    )
    gradient_scale: str = parameter(
        "equal",
        "equal: a treatment gets the task gradients at their mean length; own: as they are",
        choices=("equal", "own"),
    )
    granularity: str = parameter("model", "treat gradients of the whole model, or by layer", choices=("model", "layer"))
    regularizers: tuple[str, ...] = ()
    adapter: str = ""
    copy_top_layers: int = parameter(
        0, "encoder layers nearest the heads that each task has as its own copies; 0: none, or the checkpoint's", ">= 0"
    )
    train: str = parameter("all", "what fine-tuning trains: all, or the adapters alone, by name: {}", metavar="PART")
    head: tuple[str, ...] = parameter(
        (), "head of all tasks, or TASK=NAME of single ones: {} (default: linear, or the checkpoint's)", metavar="NAME"
    )
    pooling: str = parameter(
        "",
        f"what heads read; {_listed(POOLINGS)} (default: the checkpoint's; new: mean for minilm, else pooler)",
        metavar="NAME",
    )
    pairs: str = parameter(
        "", f"how a pair is read; {_listed(PAIRS)} (default: {Layout.pairs}, or the checkpoint's)", metavar="NAME"
    )

    augment: str = parameter("none", "augmentation of the training rows: none, {}", metavar="NAME")
    drop_longest: float = parameter(0.0, "share of each task's longest training rows to leave out", "0 <= x < 1")
    cache: str = parameter(
        "", "directory of tokenized files for later runs; off: none (default: .cache beside the run)", metavar="DIR"
    )
    max_length: int = parameter(0, "tokens of a row at most; 0: as many as the model has positions", ">= 0")

    epochs: int = parameter(5, "epochs of fine-tuning", ">= 1")
    pretrain_epochs: int = parameter(25, "epochs of training the heads on the frozen encoder; 0: none", ">= 0")
    mlm_epochs: int = parameter(0, "epochs of masked-language modelling on the training texts before all else", ">= 0")
    steps_per_epoch: int = parameter(0, "optimizer steps of an epoch; 0: as many as there are rows for", ">= 0")
    batch_size: int = parameter(32, "rows of a step, times --accumulation_steps; a forward pass takes no more", ">= 1")
    accumulation_steps: int = parameter(1, "how many times --batch_size rows make up an optimizer step", ">= 1")
    eval_batch_size: int = parameter(0, "rows of one forward pass in evaluation; 0: 64, on a GPU 1024", ">= 0")
    eval_every: int = parameter(1, "epochs between evaluations; 0: after the last only", ">= 0")
    save_every: int = parameter(0, "steps between checkpoints; 0: at each epoch's end", ">= 0")
    lr: float = parameter(0.0, "peak learning rate of fine-tuning; 0: by the model's width", ">= 0")
    pretrain_lr: float = parameter(1e-2, "peak learning rate of the frozen stage", "> 0")
    mlm_lr: float = parameter(0.0, "peak learning rate of masked-language modelling; 0: by the model's width", ">= 0")
    warmup: float = parameter(0.1, "share of the steps in which the learning rate rises", "0 <= x < 1")
    weight_decay: float = parameter(0.01, "AdamW's weight decay, not for biases and LayerNorms", ">= 0")
    pretrain_weight_decay: float = parameter(1.0, "the same in the frozen stage", ">= 0")
    max_grad_norm: float = parameter(1.0, "gradients are clipped to this norm; 0: never", ">= 0")
    patience: int = parameter(0, "epochs without a gain after which a stage ends; 0: never", ">= 0")
    average: str = parameter(
        "none",
        "weights that are scored and saved as best: none, fine-tuning's own; ema, their exponential moving average",
        choices=("none", "ema"),
    )
    ema_decay: float = parameter(0.999, "decay of the average; less in the first steps", "0 < x < 1")
    seed: int = parameter(0, "seed of everything that is random", "0 <= x < 2**63")
    threads: int = parameter(0, "CPU threads; 0: torch's default", "0 <= x <= 1024")
    device: str = parameter("auto", "auto takes CUDA where there is a GPU", choices=("auto", "cpu", "cuda"))
    cuda_graphs: bool = parameter(True, "record training steps on a GPU as CUDA graphs; the results are the same")
    amp: str = parameter("off", "mixed precision: bf16 (also the bare flag) or fp16", choices=("off", "bf16", "fp16"))
    tensorboard: bool = parameter(True, "write TensorBoard files")
    log: str = parameter(
        "", f"a tracker that gets the run's numbers too: {', '.join(TRACKERS)}", choices=["", *TRACKERS]
    )
    name: str = parameter("", "what reports call the run's setting (default: flags in which it differs)")
    format: str = parameter("png", "of the run's plots: png, pdf or svg", choices=FORMATS)

    method_parameters: Mapping[str, Any] = field(default_factory=dict)  # by flag: those of the tables' entries

    @property
    def is_treated(self) -> bool:
        return self.treatment != NO_TREATMENT

    @property
    def trains(self) -> bool:
        return self.option not in ("test", "soup")

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps

    @property
    def draws(self) -> int:
        """Draws of an optimizer step in fine-tuning."""
        return self.draws_per_step or (min(DRAWS_WITH_TREATMENT, self.rows_per_step) if self.is_treated else 1)

    @property
    def heads(self) -> dict[str, str]:
        """The heads that are asked for, by task; empty where --head is not given."""
        whole = [name for name in self.head if "=" not in name]
        single = [name.partition("=") for name in self.head if "=" in name]
        return {task: whole[-1] for task in self.tasks if whole} | {task: name for task, _, name in single}

    @property
    def loss_weights(self) -> dict[str, float]:
        """The factor on each task's loss; their sum is the number of tasks."""
        named = {task: float(value) for task, _, value in (word.partition("=") for word in self.task_weights)}
        given = dict.fromkeys(self.tasks, 1.0) | named
        return {task: weight * len(given) / sum(given.values()) for task, weight in given.items()}

    def chosen(self, table: str) -> tuple[str, ...]:
        """Names of the entries of a table that this run uses."""
        several = {"regularizer": self.regularizers, "head": tuple(self.heads.values())}
        found = several[table] if table in several else (getattr(self, table),)
        return tuple(name for name in found if name in TABLES[table][0])

    def choice(self, table: str, name: str) -> Choice:
        """An entry of a table with its parameters as the flags say."""
        entries, _ = TABLES[table]
        kind = parameters_type(entries.get(name))
        given = {part: self.method_parameters.get(flag.name, flag.default) for part, flag in flags_of(kind, f"{name}_")}
        return Choice(name, kind(**given))

    def to_dict(self) -> dict[str, Any]:
        """Every flag with its value."""
        core = {name: getattr(self, name) for name, _ in flags_of(Config)}
        switches = {name: name in self.chosen(table) for table, name in _switches()}
        parameters = {flag.name: self.method_parameters.get(flag.name, flag.default) for _, _, flag in _method_flags()}
        values = {**core, **switches, **parameters}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_dict(values: Mapping[str, Any]) -> Config:
    """The settings of these flags, defaults for others; `to_dict` gives all flags."""
    core: dict[str, Any] = {name: values[name] for name, _ in flags_of(Config) if name in values}
    core["treatment"] = next((name for name in TREATMENTS if values.get(name)), values.get("treatment", NO_TREATMENT))
    core = {name: tuple(value) if isinstance(value, list) else value for name, value in core.items()}
    return Config(
        **core,
        regularizers=tuple(name for name in REGULARIZERS if values.get(name)),
        adapter=next((name for name in ADAPTERS if values.get(name)), ""),
        method_parameters={flag.name: values[flag.name] for _, _, flag in _method_flags() if flag.name in values},
    )


def automatic(asked: Config, resolved: Config) -> list[str]:
    """The flags that were left to the program, by what was asked for and what run.resolve made of it."""
    values = resolved.to_dict()
    changed = {name: value for name, value in asked.to_dict().items() if value != values[name]}
    return [name for name, value in changed.items() if value in (0, "", "auto") or name == "pretrain_epochs"]


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, and what its program did where it did not have the flags yet."""
    decay = saved.get("weight_decay", Config.weight_decay)
    return {"pooling": Layout.pooling, "pairs": Layout.pairs, "pretrain_weight_decay": decay, **saved}


def _method_flags() -> Iterator[tuple[str, str, Flag]]:
    """(table, entry, flag) of every parameter of every entry of the tables."""
    for table, (entries, _) in TABLES.items():
        for name, entry in entries.items():
            for _, flag in flags_of(parameters_type(entry), f"{name}_"):
                yield table, name, flag


def _switches() -> Iterator[tuple[str, str]]:
    """(table, entry) of those that are flags by their own names."""
    for table, (entries, way) in TABLES.items():
        if way == "--{}":
            yield from ((table, name) for name in entries)


GROUPS = {  # by the first flag of each
    "option": "what to run",
    "tasks": "tasks and data",
    "out": "output",
    "resume": "what to run",
    "scheduler": "methods",
    "augment": "tasks and data",
    "epochs": "training",
    "tensorboard": "output",
}


class _Parser(argparse.ArgumentParser):
    """One line for a wrong command line, without the usage of sixty flags."""

    def error(self, message: str) -> Any:
        raise FlagError(message.replace("argument ", "", 1))


class _Help(argparse.RawDescriptionHelpFormatter):
    """Names and texts side by side; a text's own line ends stay."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line for part in text.split("\n") for line in textwrap.wrap(part.strip(), width)]

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)


class _Completion(argparse.Action):
    """Prints a shell's completion of the command, flags and choices, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, space: Any, value: Any, option: str | None = None) -> None:
        import shtab

        if value not in shtab.SUPPORTED_SHELLS:
            shells = ", ".join(shtab.SUPPORTED_SHELLS)
            parser.error(f"{option} {value}: expected one of {shells}{nearest(value, shtab.SUPPORTED_SHELLS)}")
        choices = {flag.name: flag.choices for _, flag in flags_of(Config) if flag.choices}
        choices |= {table: entries for table, (entries, way) in TABLES.items() if way.startswith(f"--{table}")}
        choices |= {"tasks": TASKS, "task": TASKS, "pooling": POOLINGS, "pairs": PAIRS, "treatment": _treatments()}
        for action in parser._actions:
            action.choices = action.choices or list(filter(None, choices.get(action.dest, ()))) or None
            kind = {"DIR": shtab.DIRECTORY, "FILE": shtab.FILE}.get(str(action.metavar))
            if kind and not action.choices:
                vars(action)["complete"] = kind  # an attribute of shtab's
        parser.prog = "multitask-bert"
        parser._print_message(shtab.complete(parser, value) + "\n", sys.stdout)  # minds no reader that ends early
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """argparse's parser of all flags. Flags that are not given stay absent from its result."""
    parser = _Parser(
        prog=COMMAND[-1],
        usage="%(prog)s [--option NAME] [flags]",
        description="Trains one BERT for sentiment, paraphrase and similarity together.",
        epilog=f"""examples:
  {" ".join(COMMAND)} --option finetune --scheduler pal --pcgrad
  {" ".join(COMMAND)} --data DIR --epochs 3 --seed 1 --out runs/mine
  echo "I loved every minute of it." | {" ".join(COMMAND)} \\
      --option predict --checkpoint runs/mine --task sst --names""",
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    shown = "print what makes a shell complete the flags of multitask-bert, such as bash or zsh"
    parser.add_argument("--print_completion", metavar="SHELL", action=_Completion, help=shown)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(GROUPS.values())}
    title = ""
    for name, flag in flags_of(Config):
        title = GROUPS.get(name, title)
        entries, _ = TABLES.get("adapter" if name == "train" else name, ({}, ""))
        _add(groups[title], replace(flag, help=flag.help.format(", ".join(entries))))
    switches = set(_switches())
    for table, (entries, _) in TABLES.items():
        for name, entry in entries.items():
            if (table, name) in switches:
                summary = (inspect.getdoc(entry) or name).split("\n")[0].split(". ")[0].rstrip(".:")
                what = f"short for --treatment {name}" if table == "treatment" else summary[0].lower() + summary[1:]
                _add(groups["methods"], Flag(name, False, what))
            for _, flag in flags_of(parameters_type(entry), f"{name}_"):
                _add(groups["methods"], flag)
    return parser


def _add(group: Any, flag: Flag) -> None:
    """A flag that is on or off is shown in the form that changes it; its other form is allowed."""
    if isinstance(flag.default, bool):
        for way, value in ((f"--{flag.name}", True), (f"--no-{flag.name}", False)):
            shown = ("do not " if flag.default else "") + flag.help if value is not flag.default else argparse.SUPPRESS
            group.add_argument(way, dest=flag.name, action="store_const", const=value, help=shown.replace("%", "%%"))
        return
    kind, default = type(flag.default), flag.default
    shown = f"{default:g}" if kind is float else default if default not in ("", ()) else "none"
    help = flag.help + ("" if "(default" in flag.help else f" (default {shown})")
    choices = flag.choices if not all(choice in flag.help for choice in flag.choices) else ()
    metavar = flag.metavar or ("{" + ",".join(choices) + "}" if choices else {int: "N", float: "X"}.get(kind, "NAME"))
    options: dict[str, Any] = {"nargs": "+", "action": "extend"} if kind is tuple else {"type": kind}
    if flag.name == "amp":
        options |= {"nargs": "?", "const": "bf16"}
    group.add_argument(f"--{flag.name}", metavar=metavar, help=help.replace("%", "%%"), **options)


def _with_underscores(argument: str) -> str:
    """--batch-size as --batch_size; --no-tensorboard keeps its first."""
    flag, equals, value = argument.partition("=")
    start = next((start for start in ("--no-", "--") if argument.startswith(start)), flag)
    return start + flag[len(start) :].replace("-", "_") + equals + value


def parse(arguments: Sequence[str]) -> Config:
    """The settings of a command line. Raises FlagError with all problems, one a line."""
    given, of_run = _given(arguments), dict[str, Any]()
    on_line, path = set(given), given.get("config", "")
    if path:
        found, is_of_run = _in_file(path)
        given, of_run = (given, found) if is_of_run else (_over(found, given), {})
    own = add_tasks(given)
    default: dict[str, Any] = {"tasks": [*dict.fromkeys([*_default_tasks({**of_run, **given}), *own])]}
    if given.get("option") == "export":
        default["data"] = ""  # the run's
    while True:
        config = from_dict(_over({**default, **of_run}, given))
        if not (in_vain := idle_flags(config, of_run) - given.keys()):
            break
        of_run = {name: value for name, value in of_run.items() if name not in in_vain}
    if problems := [*_wrong_values(config, {**of_run, **given}), *_contradictions(config, given)]:
        of_file = {p: path and p.split()[0].strip("-:") not in on_line for p in problems}
        raise FlagError(*(f"--config {path}: {p}" if is_there else p for p, is_there in of_file.items()))
    return config


def written_out(arguments: Sequence[str]) -> list[str]:
    """The command line with the flags of its --config in the place of that. Raises FlagError, also for a run's."""
    given = _given(arguments)
    if not (path := given.pop("config", "")):
        return [_with_underscores(argument) for argument in arguments]
    found, is_of_run = _in_file(path)
    if is_of_run:
        raise FlagError(f"--config {path}: all settings of a run, expected a TOML file with some")
    parse(arguments)  # its errors name the file
    return [*_as_arguments(_over(found, given))]


def _in_file(path: str) -> tuple[dict[str, Any], bool]:
    """The flags of a --config, by name, and whether it is a run's config.json. Raises FlagError."""
    values = read_settings(Path(path))
    is_of_run = "layout" in values
    try:
        found = _given([*_as_arguments(_settings_of_run(values, path) if is_of_run else values)])
    except FlagError as error:
        raise FlagError(*(f"--config {path}: {line}" for line in error.args)) from None
    if "config" in found:
        raise FlagError(f"--config {path}: --config: expected on the command line alone, leave it out")
    return found, is_of_run


def _given(arguments: Sequence[str]) -> dict[str, Any]:
    """The flags of a command line, by name."""
    parser = make_parser()
    parsed, unknown = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    if unknown:
        known = {name: f"; did you mean --option {name}?" for name in OPTIONS}
        wrong = [word.partition("=")[0] for word in unknown if word.startswith("-")] or unknown[:1]
        flags = [flag for flag in parser._option_string_actions if wrong[0].startswith("-")]
        hints = {word: known.get(word) or nearest(word, flags) or "; --help lists all flags" for word in wrong}
        raise FlagError(*(f"{shown(word)}: unknown{hint}" for word, hint in hints.items()))
    return vars(parsed)


def read_settings(path: Path) -> dict[str, Any]:
    """What `--config` names: a TOML file, or a run's config.json. Raises FlagError if it is neither."""
    try:
        content = read_file(path).decode()
        values = json.loads(content) if path.suffix == ".json" else tomllib.loads(content)
    except OSError as error:
        raise FlagError(f"--config {path}: {error.strerror}, expected a TOML file or a run's config.json") from None
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise FlagError(f"--config {path}: not readable as {kind} ({error})") from None
    if not isinstance(values, dict) or (path.suffix == ".json" and not isinstance(values.get("layout"), dict)):
        raise FlagError(f"--config {path}: no settings of a run, expected its config.json")
    return values


def _as_arguments(values: Mapping[str, Any]) -> Iterator[str]:
    """A file's settings as a command line. Raises FlagError for a table, and where a switch is no true or false, or
    something else is."""
    actions = make_parser()._option_string_actions
    for name, value in values.items():
        if any(isinstance(item, dict) for item in (value if isinstance(value, list) else [value])):
            raise FlagError(f"{shown(name)}: a table, expected flags and their values without tables")
        if (action := actions.get(_with_underscores(f"--{name}"))) is not None:
            if action.nargs == 0 and not isinstance(value, bool):
                raise FlagError(f"--{name}: {shown(repr(value))}, expected true or false")
            if action.nargs not in (0, "?") and isinstance(value, bool):
                raise FlagError(f"--{name}: {str(value).lower()}, expected a value")
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        else:
            yield f"--{name}={value}"


def _settings_of_run(values: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The flags that a run's config.json holds of its command line; its tasks join TASKS.

    Without those that belong to that run alone, and what it chose automatically: flags beside these, and the machine,
    may need another choice. A run records all, also those that do nothing in it. Raises FlagError.
    """
    if problem := mismatch(values.get("automatic"), (None, [str])):
        raise FlagError(f"automatic {problem}")
    try:
        add_saved_tasks(values["layout"], path)
    except TaskFileError as error:
        raise FlagError(str(error)) from None
    left_out = {*RECORD_KEYS, *OWN_FLAGS, *(values.get("automatic") or ())}
    return {name: value for name, value in completed(values).items() if name not in left_out and value not in ("", [])}


def _over(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values with those given in their place; a treatment stands for all that is said of one, and its arguments."""
    of_treatment = {"treatment", *TREATMENTS}
    replaced = of_treatment if given.keys() & of_treatment else set()
    if replaced and given.get("treatment") != values.get("treatment"):
        replaced |= {"treatment_arguments"}
    return {name: value for name, value in values.items() if name not in replaced} | dict(given)


def add_tasks(given: Mapping[str, Any]) -> list[str]:
    """The tasks of task files, whose names are returned, and those of checkpoints join TASKS. Raises FlagError."""
    try:
        own = [task for name in given.get("task_file", ()) for task in add_task_file(Path(name))]
        for name in filter(None, [given.get("checkpoint"), *given.get("checkpoints", ())]):
            with suppress(CheckpointError):  # it is said again, with its reason, when the model is loaded
                read_layout(checkpoint_folder(Path(name)))
    except TaskFileError as error:
        raise FlagError(str(error)) from None
    return own


def checked(values: Mapping[str, Any]) -> Config:
    """The settings that a run has recorded, as `to_dict` gave them. Raises FlagError if one is missing or wrong."""
    for name, default in Config().to_dict().items():
        value, kinds = values.get(name), (float, int) if isinstance(default, float) else (type(default),)
        if type(value) not in kinds or (isinstance(value, list) and not all(isinstance(x, str) for x in value)):
            found = shown(repr(value)) if name in values else "missing"
            raise FlagError(f"{name} is {found}, expected one such as {default!r}")
    config = from_dict(values)
    at_odds = [f"--{name}: at odds with others" for name, value in config.to_dict().items() if value != values[name]]
    if problems := [*_wrong_values(config, values), *_conflicts(config, {}), *at_odds]:
        raise FlagError(*dict.fromkeys(problems))
    return config


def _default_tasks(given: Mapping[str, Any]) -> list[str]:
    """The tasks whose files are there and, where a checkpoint is scored as it is, that it has heads for."""
    tasks, starts = tasks_in(given.get("data", "sample")), [given.get("checkpoint"), *given.get("checkpoints", ())]
    if given.get("option") in ("test", "soup") and (start := next(filter(None, starts), "")):
        with suppress(CheckpointError):  # told of when it is loaded
            if layout := read_layout(checkpoint_folder(Path(start))):
                tasks = [task for task in tasks if task in layout.tasks] or list(layout.tasks) or tasks
    return tasks


def _wrong_values(config: Config, given: Mapping[str, Any]) -> Iterator[str]:
    """Values that are outside their limits, and names of what is not there."""
    flags = [flag for _, flag in flags_of(Config)] + [flag for _, _, flag in _method_flags()]
    for flag in flags:
        if flag.name in given and (problem := flag.problem(given[flag.name])):
            yield problem + (nearest(given[flag.name], list(flag.choices)) if flag.choices else "")
    if config.log in TRACKERS and importlib.util.find_spec(config.log) is None:
        yield f"--log {config.log}: the package {config.log} is not installed, expected: pip install {config.log}"
    if 0 < config.max_length < 5:
        yield f"--max_length {config.max_length}: expected 0, or 5 or more: [CLS] a [SEP] b [SEP]"
    if taken := [task for task in config.tasks if hasattr(ModuleDict(), task)]:
        yield f"--tasks {taken[0]}: torch keeps this name for itself, expected another one"
    if len(set(config.tasks)) != len(config.tasks):
        yield f"--tasks {' '.join(config.tasks)}: expected each task once"
    of_heads = [name.partition("=")[0] if "=" in name else "" for name in config.head]
    if len(set(of_heads)) != len(of_heads):
        yield f"--head {' '.join(config.head)}: expected one head for all tasks, and each task once"
    weighted = [word.partition("=")[0] for word in config.task_weights]
    for i, word in enumerate(config.task_weights):
        if weighted[i] not in config.tasks or weighted[i] in weighted[:i] or not _is_weight(word.partition("=")[2]):
            once = f"each of {', '.join(config.tasks)} at most once"
            yield f"--task_weights {shown(word)}: expected TASK=NUMBER, {once}, the number from 1e-6 to 1e6"
    known: tuple[tuple[str, Sequence[str], Sequence[str]], ...] = (
        ("tasks", config.tasks, list(TASKS)),
        ("task", [config.task] if config.task else [], list(TASKS)),
        ("scheduler", [config.scheduler], list(SCHEDULERS)),
        ("pooling", [config.pooling] if "pooling" in given else [], list(POOLINGS)),
        ("pairs", [config.pairs] if "pairs" in given else [], list(PAIRS)),
        ("augment", [config.augment], ["none", *AUGMENTATIONS]),
        ("train", [config.train], ["all", *ADAPTERS]),
        ("head", list(config.heads.values()), list(HEADS)),
        ("head", list(config.heads), list(config.tasks)),
    )
    for name, values, names in known:
        for value in values:
            if value not in names:
                yield f"--{name} {shown(value)}: expected one of {', '.join(names)}{nearest(value, names)}"
    names = _treatments()
    if config.treatment in (*METHODS, *REFUSED) and len(config.tasks) > 1:
        try:
            find_treatment(config.treatment, config.treatment_arguments)(NoParameters(), len(config.tasks), 1)
        except ValueError as error:
            yield str(error)
    elif config.treatment not in names:
        near = nearest(config.treatment, names)
        yield f"--treatment {shown(config.treatment)}: expected one of {', '.join(names)}{near}"


def _is_weight(text: str) -> bool:
    try:
        return 1e-6 <= float(text) <= 1e6
    except ValueError:
        return False


def _contradictions(config: Config, given: Mapping[str, Any]) -> Iterator[str]:
    """Every combination of flags that would silently do nothing, or cannot be done."""
    if config.resume:
        others = (name for name in given if name not in RESUME_FLAGS)
        new = f", or start a new run from its model: {command(f'--checkpoint={config.resume}')}"
        way = f"leave it out{new if (Path(config.resume) / 'best').is_dir() else ''}"
        yield from (f"--{name}: --resume takes it from the run; {way}" for name in others)
    elif config.option == "predict":
        others = (name for name in given if name not in PREDICT_FLAGS)
        yield from (f"--{name}: --option predict does not use it; leave it out" for name in others)
        if not config.checkpoint:
            yield "--option predict: expected --checkpoint DIR"
        if not config.task:
            yield f"--option predict: expected --task, one of {', '.join(TASKS)}"
        if config.names and config.task in TASKS and not TASKS[config.task].output.class_names:
            yield f"--names: {config.task} is a score, which has no classes"
    elif config.option == "export":
        others = (name for name in given if name not in EXPORT_FLAGS)
        yield from (f"--{name}: --option export does not use it; leave it out" for name in others)
        if not config.checkpoint:
            yield "--option export: expected --checkpoint DIR"
    else:
        yield from (f"--{name}: {reason}" for name, reason in flags_in_vain(config, given))
        yield from _conflicts(config, given)


def has_frozen_stage(config: Config) -> bool:
    """Whether heads are trained on the frozen encoder, or would be if the run trains: a checkpoint's are trained."""
    return config.option != "finetune" or not (config.checkpoint or config.pretrain_epochs == 0)


def flags_in_vain(config: Config, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each flag that lacks what it needs, and why it would do nothing."""
    option, is_full = f"--option {config.option}", config.option == "finetune"
    of_several = ("draws_per_step", "scheduler", "task_weights", "copy_top_layers")
    of_checkpoint = ("checkpoint", "model", "head", "pooling", "pairs")
    tuning = (*REGULARIZERS, *ADAPTERS, "train", "epochs", "lr", "draws_per_step", "average", *of_several[2:])
    training = ["augment", "drop_longest", "steps_per_epoch", "accumulation_steps", "warmup", "scheduler", "patience"]
    training += ["weight_decay", "pretrain_epochs", "pretrain_lr", "pretrain_weight_decay", "save_every"]
    training += ["max_grad_norm", "eval_every"]
    training += ["mlm_epochs", "batch_size"]
    has_pairs = any(len(TASKS[task].text_columns) == 2 for task in config.tasks if task in TASKS)
    heads = [HEADS.get(config.heads.get(task, "")) for task in config.tasks]  # None: unknown, or the checkpoint's
    reads_pooled = any(head is None or Reads.POOLED in head.reads for head in heads)
    with_treatment = "expected only with a gradient treatment (--pcgrad, --gradvac, --treatment)"
    needs: list[tuple[bool, str, Sequence[str]]] = [
        (False, "expected only with --option predict", ("task", "input", "output", "names")),
        (False, "expected only with --option export", ("max_loss", "vocabulary")),
        (config.is_treated, with_treatment, ("granularity", "gradient_scale")),
        (config.average == "ema", "expected only with --average ema", ("ema_decay",)),
        (config.treatment in METHODS, "expected only with a method of torchjd", ("treatment_arguments",)),
        (is_full, f"{option} does not fine-tune, expected only with finetune", tuning),
        (config.trains, f"{option} does not train", training),
        (config.option == "soup", "expected only with --option soup", ("checkpoints", "soup")),
        (config.option != "soup", f"{option} takes it from --checkpoints", of_checkpoint),
        (config.option != "individual_pretrain", "individual_pretrain trains one task at a time", ("scheduler",)),
        (config.mlm_epochs > 0, "expected only with --mlm_epochs", ("mlm_lr",)),
        (has_frozen_stage(config), "there is no frozen stage", ("pretrain_lr", "pretrain_weight_decay")),
        (has_pairs, f"no task of {' '.join(config.tasks)} compares two texts", ("pairs",)),
        (reads_pooled, "no head reads a pooled vector", ("pooling",)),
        (len(config.tasks) > 1, "there is one task, expected two --tasks or more", of_several),
    ]
    for table, name, flag in _method_flags():
        way, is_chosen = TABLES[table][1].format(name), name in config.chosen(table)
        needs.append((is_chosen, f"expected only with {way}", (flag.name,)))
        if is_chosen and flag.only_with:
            other, value = flag.only_with
            is_met = getattr(config.choice(table, name).parameters, other) == value
            needs.append((is_met, f"expected only with --{name}_{other} {value}", (flag.name,)))
    for is_met, reason, names in needs:
        yield from ((name, reason) for name in names if not is_met and given.get(name, False) is not False)


def idle_flags(config: Config, values: Mapping[str, Any]) -> set[str]:
    """Those of a run's flags that do nothing in a run of these settings, such as methods of fine-tuning in a frozen
    stage."""
    idle = {name for name, _ in flags_in_vain(config, values)}
    if config.option != "finetune" or len(config.tasks) == 1:  # _conflicts has the reasons
        idle |= {"treatment", *TREATMENTS} & values.keys()
    if config.option == "finetune" and config.checkpoint:
        idle |= {"pretrain_epochs"} & values.keys()
    return idle


def _conflicts(config: Config, given: Mapping[str, Any]) -> Iterator[str]:
    """A line for each group of flags, and of what they stand for, that are at odds."""
    option, treatment, draws = f"--option {config.option}", f"--treatment {config.treatment}", config.draws
    is_full, num_tasks, num_rows = config.option == "finetune", len(config.tasks), config.rows_per_step
    every_task = f"a treatment takes every task in every step, at least {num_tasks}"
    named = {name for name in TREATMENTS if given.get(name)} | {given.get("treatment", config.treatment)}
    if len(named) > 1 and ("treatment" in given or len(named - {NO_TREATMENT}) > 1):
        yield f"{', '.join(f'--{name}' for name in (*TREATMENTS, 'treatment'))}: expected at most one of these"
    if sum(bool(given.get(name)) for name in ADAPTERS) > 1:
        yield f"{', '.join(f'--{name}' for name in ADAPTERS)}: expected one of them"
    if config.option == "test" and not config.checkpoint:
        yield f"{option}: expected --checkpoint DIR"
    if config.option == "soup" and len(config.checkpoints) < 2:
        yield f"{option}: expected --checkpoints DIR DIR, two or more"
    if config.option in ("pretrain", "individual_pretrain") and config.pretrain_epochs == 0:
        yield f"--pretrain_epochs 0: {option} would do nothing"
    if is_full and config.checkpoint and given.get("pretrain_epochs"):
        yield "--pretrain_epochs: --checkpoint has trained heads, the frozen stage is skipped"
    if is_full and config.checkpoint and config.mlm_epochs:
        yield "--mlm_epochs: --checkpoint has trained heads, which another encoder would not fit"
    if config.checkpoint and "model" in given:
        yield "--model, --checkpoint: the checkpoint holds the encoder, expected one of them"
    if config.mlm_epochs and config.copy_top_layers:
        yield f"--mlm_epochs {config.mlm_epochs}: expected without --copy_top_layers, whose layers belong to the tasks"
    if config.patience and config.eval_every == 0:
        yield f"--patience {config.patience}: --eval_every 0 never evaluates before the last epoch"
    if config.train in ADAPTERS and config.train != config.adapter:
        yield f"--train {config.train}: expected with --{config.train}"
    if config.train in ADAPTERS and config.copy_top_layers:
        yield f"--train {config.train}: trains adapters alone, --copy_top_layers would do nothing"
    if config.train in ADAPTERS and config.task_weights:
        yield f"--train {config.train}: adapters are each task's own, --task_weights would do nothing"
    if config.augment in AUGMENTATIONS and all(TASKS[t].output.num_classes is None for t in config.tasks if t in TASKS):
        yield f"--augment {config.augment}: no task of {' '.join(config.tasks)} has classes to fill up"
    if config.is_treated:
        if not is_full:
            yield f"{treatment}: {option} shares no trained parameters between tasks"
        if config.train in ADAPTERS:
            yield f"--train {config.train}: adapters are each task's own, {treatment} would do nothing"
        if num_tasks == 1:
            yield f"{treatment}: one task has no other to conflict with, expected two --tasks or more"
        if config.treatment in SCALARIZERS and (config.gradient_scale, config.granularity) != ("own", "model"):
            yield f"{treatment}: it weighs the losses, expected --gradient_scale own and --granularity model"
        if num_rows < num_tasks:
            yield f"--batch_size {config.batch_size}: {every_task} rows"
        elif draws < num_tasks:
            yield f"--draws_per_step {draws}: {every_task} draws"
    if draws > num_rows > 0:
        yield f"--draws_per_step {draws}: expected at most the rows of a step, {num_rows}"
