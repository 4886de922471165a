"""The model card of a run, and its way to a model hub: `python evaluation.py RUN --push NAME`."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reports.comparison import NOT_COMPARED
from reports.document import Section, Table, to_text
from reports.finished_run import MEAN, FinishedRun
from run_record import CONFIG, RunError, checksum_problem, read_json, run_of, write_checksums, write_json
from tasks import TASKS

CARD = "README.md"
EMBEDDED = "sentence-transformers/all-MiniLM-L6-v2"
ABOUT = """One encoder with a head for each of the tasks below, trained {how} by multitask-bert. The encoder alone is
a checkpoint for `transformers.AutoModel`; the heads need the program, in whose folder this answers:

    from huggingface_hub import snapshot_download
    from predictor import load

    load(snapshot_download("{name}"){limit}).predict("{task}", [{text}])"""
FLATTERED = "The model it began as was tuned on pairs that include Quora duplicates: the paraphrase score flatters it."
BASIC = {"option", "scheduler", "treatment", "pooling", "pairs", "epochs", "pretrain_epochs", "batch_size", "lr"}
BASIC |= {"pretrain_lr", "average", "seed", "amp"}
PLACES = {"model", "checkpoint", "checkpoints", "soup"}
OWN_SAMPLE = "the program's own sample"
LIMITS = "Scores are of the dev files, by which {} chosen: expect a little less of other texts of the kind."
OTHERS = "Scores are of other dev files than those by which {} chosen."


def model_card(
    run: FinishedRun,
    name: str,
    about: str = ABOUT,
    more: Sequence[Section] = (),
    scores: Mapping[str, Any] = MappingProxyType({}),
    scored: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The card as markdown behind the head that hubs read.

    name: of the model on the hub. more: before the settings. scores: of the dev files, by default the run's. scored:
    the data that these are of and its dev files, as `data` and `data_files` of a run's config.json; by default its own.
    """
    from huggingface_hub import EvalResult, ModelCardData

    from checkpoints import EMBEDDED_MODEL  # which imports torch

    found, rows, dev = list[EvalResult](), [], scores or run.results["dev"]
    files = {**run.config["data_files"], **scored.get("data_files", {})}
    data_config = {**run.config, **scored, "data_files": files}
    is_own = all(files[name]["sha256"] == of for name, of in run.data_checksums("dev").items())
    for task in (TASKS[name] for name in run.tasks):
        title = task.title if task.folder or data_config["data"] != "sample" else f"{task.title} ({OWN_SAMPLE})"
        kind = "text-classification" if task.output.class_names else "sentence-similarity"
        answers = ", ".join(task.output.class_names) or task.output.allowed
        for metric, value in dev[task.name].items():
            data: dict[str, Any] = {"dataset_type": task.name, "dataset_name": title, "dataset_split": "dev"}
            found.append(EvalResult(task_type=kind, metric_type=metric, metric_value=round(value, 4), **data))
            rows.append([task.name, title, " + ".join(task.text_columns), answers, metric, f"{value:.3f}"])
    rows.append(["", MEAN, "", "", "", f"{dev[MEAN]:.3f}"])
    base = str(run.config.get("model", ""))
    head = ModelCardData(
        language="en",
        base_model=EMBEDDED if base == EMBEDDED_MODEL else None if base[:1] in ("", "/") else base,
        pipeline_tag="text-classification",
        tags=["multi-task-learning", *run.tasks],
        model_name=name.split("/")[-1],
        eval_results=found,
    )
    first = TASKS[run.tasks[0]]
    text = '"a text"' if len(first.text_columns) == 1 else '("a text", "another")'
    how = "one by one" if run.config.get("option") == "individual_pretrain" else "together"
    columns = ("task", "what", "texts", "answers", "metric of the dev file", "score")
    of_tasks = Section("Tasks and scores", [Table(columns, rows), *_caveats(run, is_own), _data(data_config)])
    limit = f", max_length={run.config['max_length']}" if run.config.get("max_length") else ""
    parts = [f"# {name.split('/')[-1]}", about.format(name=name, limit=limit, task=first.name, text=text, how=how)]
    mixed = [of["checkpoint"] for of in run.results.get("soup") or [] if of["kept"]]
    config = {**run.config, **({"checkpoints": mixed} if mixed else {})}
    lines = [", ".join(_settings(run.config)), *_mixed(run.config, mixed), *_history(config, "It", set())]
    settings = Section("Settings", ["\n\n".join(lines)])
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(
        [*parts, to_text([of_tasks, *more, settings], is_markdown=True)]
    )


def _caveats(run: FinishedRun, is_own: bool) -> Iterator[str]:
    """What the scores do not say by themselves. is_own: they are of the run's dev files."""
    from checkpoints import EMBEDDED_MODEL

    chosen = "the epoch was" if run.config.get("option") != "soup" else "its checkpoints were"
    yield (LIMITS if is_own else OTHERS).format(chosen)
    if run.config.get("model") == EMBEDDED_MODEL and "para" in run.tasks:
        yield FLATTERED
    yield from run.remarks


def _data(config: Mapping[str, Any]) -> str:
    """How many rows a run was trained on and compared with."""
    keys = [(f"{task} {split}", TASKS[task].file_key(split)) for split in ("train", "dev") for task in config["tasks"]]
    counts = {name: config["data_files"].get(key, {}).get("rows") for name, key in keys}
    return "Rows of data: " + ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def _settings(config: Mapping[str, Any]) -> Iterator[str]:
    """The flags that say how a run was trained, without places on the machine: the basic ones, and what else is not as
    by default."""
    from config import Config, from_dict, idle_flags  # which imports torch

    defaults = Config().to_dict()
    idle = idle_flags(from_dict(config), config) | ({"seed"} if config.get("checkpoints") else set())
    for name in defaults:
        value = config.get(name, defaults[name])
        if name == "checkpoints" and value:
            yield f"{config.get('soup', 'uniform')} soup of {len(value)} checkpoints"
        is_basic = name in BASIC or (value != defaults[name] and name not in NOT_COMPARED | PLACES)
        if is_basic and name not in idle and value not in ("", []):
            words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield name if value is True else f"no {name}" if value is False else f"{name} {words}"


def _mixed(config: Mapping[str, Any], kept: Sequence[str]) -> Iterator[str]:
    """Which of a soup's checkpoints are in the mean."""
    if kept:
        names = ", ".join(run_of(Path(path)).name for path in kept)
        yield f"{len(kept)} of {len(config['checkpoints'])} are in the mean: {names}"


def _history(config: Mapping[str, Any], name: str, known: set[Path]) -> Iterator[str]:
    """A line for each run whose checkpoint the named one began with, and for those before it."""
    for start in map(Path, filter(None, [config.get("checkpoint"), *config.get("checkpoints", ())])):
        path = run_of(start)
        if path in known:
            continue
        known.add(path)
        try:
            before = read_json(path / CONFIG)
            line = f"{', '.join(_settings(before))}. {_data(before)}"
        except (RunError, LookupError, TypeError, AttributeError, ValueError):  # moved, or no run's
            yield f"{name} began with {path.name}, of which no more is known."
        else:
            yield f"{name} began with {path.name}: {line}"
            yield from _history(before, path.name, known)


def write_model(run: FinishedRun, folder: Path, name: str) -> None:
    """The best checkpoint with its card in a new folder; folders of this machine stay out of it."""
    shutil.copytree(run.path / "best", folder)
    values = read_json(folder / CONFIG)
    for task in values["multitask_bert"]["tasks"].values():
        task.get("definition", {}).pop("folder", None)
    write_json(folder / CONFIG, values)
    write_checksums(folder)  # the card may be edited on the hub
    (folder / CARD).write_text(model_card(run, name), "utf-8")


def push(run: FinishedRun, name: str) -> str:
    """Puts what `write_model` writes on the hub, in a repository that is made if need be; returns its address.

    Raises RunError if there is no whole checkpoint or the hub refuses.
    """
    from huggingface_hub import HfApi

    if not (run.path / "best").is_dir():
        raise RunError(f"--push {name}: {run.path} has no best checkpoint, expected a run that trained")
    if problem := checksum_problem(run.path / "best"):
        raise RunError(f"--push {name}: {problem}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_model(run, folder, name)
        try:
            address = HfApi().create_repo(name, exist_ok=True)
            HfApi().upload_folder(
                repo_id=address.repo_id, folder_path=folder, commit_message=f"The model of {run.path.name}"
            )
        except Exception as error:  # the hub client raises a dozen kinds: names, tokens, connections
            reason = " ".join(str(error).split())[:200]
            raise RunError(f"--push {name}: the hub did not take it ({reason}); the run is as it was") from None
    return str(address)
