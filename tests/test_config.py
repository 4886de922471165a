"""Flags: that they exist, their defaults and limits, and all contradictions are found before anything is loaded."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from config import DRAWS_WITH_TREATMENT, OPTIONS, TABLES, Config, FlagError, from_dict, make_parser, parse
from helpers import THREE, cases, write_data
from parameters import Choice, Flag, flags_of, parameters_type
from tasks import TASKS

PUBLIC_FLAGS = """
    option tasks model data out resume checkpoint scheduler temperature_tau draws_per_step pcgrad gradvac gradvac_beta
    treatment smart bregman pal pal_size augment drop_longest head mlp_layers epochs pretrain_epochs steps_per_epoch
    batch_size accumulation_steps eval_batch_size save_every lr pretrain_lr warmup weight_decay pretrain_weight_decay
    max_grad_norm patience mlm_epochs mlm_lr seed threads device amp task input output average ema_decay rdrop
    rdrop_alpha task_weights copy_top_layers checkpoints soup names name format
"""
METHOD_FLAGS = [
    (table, name, flag)
    for table, (entries, _) in TABLES.items()
    for name, entry in entries.items()
    for _, flag in flags_of(parameters_type(entry), f"{name}_")
]


def settings(line: str) -> Config:
    return parse(line.split())


def problems(line: str) -> list[str]:
    """What is wrong with a command line, a problem a line."""
    with pytest.raises(FlagError) as caught:
        parse(line.split())
    return str(caught.value).split("\n")


def test_every_flag_is_in_the_help_with_a_text_and_a_default_within_its_limits() -> None:
    shown = make_parser().format_help()
    for name in PUBLIC_FLAGS.split():
        assert f"  --{name}" in shown, name
    for flag in [*(flag for _, flag in flags_of(Config)), *(flag for _, _, flag in METHOD_FLAGS)]:
        way = f"  --no-{flag.name} " if flag.default is True else f"  --{flag.name} "
        entry = " ".join(re.split(r"\n  --|\n\n", shown[shown.index(way) + 2 :])[0].split())
        assert flag.help and flag.problem(flag.default) is None and flag.help.split()[0] in entry
        assert isinstance(flag.default, bool) or "(default" in entry, entry
        assert all(choice in entry for choice in flag.choices), entry
    for _, (entries, _) in TABLES.items():
        assert all(name in shown for name in entries)


def test_the_help_is_in_groups_and_fits_a_terminal() -> None:
    lines = make_parser().format_help().splitlines()
    assert max(map(len, lines)) <= 80 and lines[0] == "usage: multitask_classifier.py [--option NAME] [flags]"
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    groups = ["what to run:", "tasks and data:", "output:", "methods:", "training:"]
    assert titles == ["options:", *groups, "examples:"]
    named = [line.strip() for line in lines if re.match(r"  +(--option NAME +)?\w+: ", line)]
    assert [line.partition(": ")[0].split()[-1] for line in named][: len(OPTIONS)] == list(OPTIONS)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("--schedular pal", "--scheduler"),
        ("--batch-siz=3", "--batch_size"),
        ("--epoch_steps 9", "--steps_per_epoch"),
        ("--scheduler pall", "pal"),
        ("--amp bf61", "bf16"),
        ("--head mpl", "mlp"),
        ("--tasks sst parra", "para"),
        ("--pcgrad --granularity modell", "model"),
    ],
)
def test_what_is_not_known_is_answered_with_the_nearest_that_is(line: str, word: str) -> None:
    (found,) = problems(line)
    assert found.endswith(f"; did you mean {word}?"), found


def test_the_default_tasks_are_those_that_have_files(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    assert settings(f"--data {data}").tasks == THREE and settings("--data nowhere").tasks == tuple(TASKS)
    for file in data.glob("quora-*"):
        file.unlink()
    assert settings(f"--data {data}").tasks == ("sst", "sts")
    assert settings(f"--data {data} --tasks para").tasks == ("para",)


@pytest.mark.parametrize(("table", "name", "flag"), METHOD_FLAGS, ids=[flag.name for _, _, flag in METHOD_FLAGS])
def test_a_parameter_goes_with_its_method_only(table: str, name: str, flag: Flag) -> None:
    way = TABLES[table][1].format(name)
    value = flag.default or {str: "somewhere", int: 1}[type(flag.default)]
    assert problems(f"--{flag.name} {value}") == [f"--{flag.name}: expected only with {way}"]
    config = settings(f"{way} --{flag.name} {value}")
    assert config.method_parameters == {flag.name: value} and config.chosen(table)[0] == name
    if flag.only_with:  # a field beside it has another value
        other, needed = flag.only_with
        field = next(of for part, of in flags_of(parameters_type(TABLES[table][0][name]), f"{name}_") if part == other)
        for choice in {*field.choices} - {needed}:
            found = problems(f"{way} --{flag.name} {value} --{field.name} {choice}")
            assert found == [f"--{flag.name}: expected only with --{field.name} {needed}"]


def test_heads_of_adapters_go_with_those_that_have_an_attention() -> None:
    (found,) = problems("--pal --pal_kind low_rank --pal_heads 2")
    assert found == "--pal_heads: expected only with --pal_kind attention"


def test_defaults() -> None:
    config = parse([])
    assert (config.option, config.model, config.data) == ("finetune", "minilm", "sample")
    assert config.tasks == THREE
    assert (config.treatment, config.regularizers, config.adapter, config.amp) == ("sum", (), "", "off")
    assert (config.accumulation_steps, config.max_grad_norm, config.device) == (1, 1.0, "auto")
    values = config.to_dict()
    assert [values[f"smart_{name}"] for name in ("eps", "sigma", "eta", "steps")] == [1e-5, 1e-5, 1e-3, 1]
    assert [values[name] for name in ("gradvac_beta", "eda_alpha", "drop_longest", "pal")] == [0.01, 0.1, 0.0, False]


def test_a_given_value_reaches_the_settings_with_its_type() -> None:
    config = settings("--tasks sts sst --lr 3e-5 --epochs 2 --amp --no-tensorboard --smart --smart_weight 5")
    assert (config.tasks, config.lr, config.epochs, config.amp) == (("sts", "sst"), 3e-5, 2, "bf16")
    assert (config.tensorboard, config.regularizers) == (False, ("smart",))
    assert config.choice("regularizer", "smart").to_dict()["parameters"]["weight"] == 5.0
    assert config.choice("scheduler", "pal") == Choice("pal")
    config = settings("--batch-size 5 --draws-per-step=4 --gradvac --gradvac-beta 0.5 --out=a--b-c --no-tensorboard")
    assert (config.batch_size, config.draws_per_step, config.out, config.tensorboard) == (5, 4, "a--b-c", False)
    assert config.method_parameters == {"gradvac_beta": 0.5}  # hyphens in a flag are underscores, its value stays


@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
def test_the_short_flag_is_the_treatment_of_its_name(name: str) -> None:
    assert parse([f"--{name}"]) == parse(["--treatment", name]) == parse([f"--{name}", "--treatment", name])
    assert parse([f"--{name}"]).treatment == name


@pytest.mark.parametrize(
    ("line", "draws", "rows"),
    [
        ("", 1, 32),
        ("--draws_per_step 4 --batch_size 8 --accumulation_steps 3", 4, 24),
        ("--pcgrad", DRAWS_WITH_TREATMENT, 32),
        ("--scheduler random --pcgrad --batch_size 5", 5, 5),
        ("--gradvac --batch_size 5 --accumulation_steps 2", 10, 10),
        ("--gradvac --batch_size 5 --accumulation_steps 4", 16, 20),
        ("--scheduler pal --pcgrad --draws_per_step 5", 5, 32),
    ],
)
def test_draws_and_rows_of_a_step(line: str, draws: int, rows: int) -> None:
    assert (settings(line).draws, settings(line).rows_per_step) == (draws, rows)


@pytest.mark.parametrize(
    ("line", "heads"),
    [("", []), ("--head mlp", ["mlp"] * 3), ("--head mlp sts=linear", ["mlp", "mlp", "linear"])],
)
def test_heads_of_all_tasks_and_of_single_ones(line: str, heads: list[str]) -> None:
    assert settings(line).heads == dict(zip(THREE, heads, strict=bool(heads)))
    assert settings("--head para=mlp").heads == {"para": "mlp"}


def test_a_flag_of_several_values_may_be_given_several_times() -> None:
    for flag, values in (
        ("head", ["mlp", "sst=linear"]),
        ("tasks", ["sst", "sts"]),
        ("task_weights", ["sts=2", "para=0.5"]),
    ):
        once, each = parse([f"--{flag}", *values]), parse([word for value in values for word in (f"--{flag}", value)])
        assert once == each and list(getattr(each, flag)) == values
    with pytest.raises(
        FlagError, match="--head sst=mlp sst=linear: expected one head for all tasks, and each task once"
    ):
        settings("--head sst=mlp --head sst=linear")


def test_settings_survive_the_run_directory() -> None:
    line = "--tasks para sts --scheduler temperature --temperature_tau 3 --gradvac --gradvac_beta 0.2 --amp fp16"
    line += " --lr 1e-4 --task_weights para=3 --smart --bregman --pal --pal_size 6 --head mlp sts=linear --mlp_layers 2"
    config = settings(f"{line} --copy_top_layers 1")
    read = from_dict(json.loads(json.dumps({**config.to_dict(), "versions": {"python": "3"}})))
    assert read.to_dict() == config.to_dict() and read.heads == config.heads
    for table in TABLES:
        assert read.chosen(table) == config.chosen(table)
        for name in read.chosen(table):
            assert read.choice(table, name) == config.choice(table, name)


@pytest.mark.parametrize("line", cases("limits.txt"))
def test_a_value_outside_its_limits_or_unknown_is_named_with_what_is_allowed(line: str) -> None:
    given, _, _ = line.partition(": ")
    wrong = line[line.rindex("--", 0, line.index(": ")) :]
    (found,) = problems(given)
    assert found.startswith(wrong.replace("--head other=mlp", "--head other")), found


def test_what_is_to_run_without_its_flag_names_the_flag() -> None:
    assert list(problems("pretrain")) == ["pretrain: unknown; did you mean --option pretrain?"]


@pytest.mark.parametrize("case", cases("refused.txt"))
def test_flags_that_contradict_each_other_are_refused_by_name(case: str) -> None:
    line, _, words = case.partition("|")
    (found,) = problems(line)
    assert all(word in found for word in words.split()), found


def test_a_number_that_is_none_or_too_large_is_one_line() -> None:
    too_large = "a whole number below 2**63"
    for value, words in (("9" * 30, too_large), ("9" * 400, too_large), ("two", "'two'")):
        (found,) = problems(f"--epochs {value}")
        assert found.startswith("--epochs") and found.endswith(words)


def test_all_problems_are_reported_at_once() -> None:
    found = problems("--epochs 0 --warmup 2 --gradvac_beta 7 --smart_eps 1e-4 --pal_size 8 --train pal --tasks sst sst")
    for name in ("--epochs", "--warmup", "--gradvac_beta", "--smart_eps", "--pal_size", "--train pal", "--tasks"):
        assert any(problem.startswith(name) for problem in found), (name, found)


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return f"--config {path}"


def test_a_settings_file_is_a_command_line_that_flags_win_over(tmp_path: Path) -> None:
    text = """
        tasks = ["para", "sts"]
        lr = 3e-5
        epochs = 2
        tensorboard = false
        pcgrad = true
        amp = "bf16"
        rdrop = true
        rdrop_alpha = 2
        task_weights = ["sts=2"]
    """
    line = "--tasks para sts --lr 3e-5 --epochs 2 --no-tensorboard --pcgrad --amp --rdrop --rdrop_alpha 2"
    line += " --task_weights sts=2"
    file = written(tmp_path / "run.toml", text)
    assert replace(settings(file), config="") == settings(line)
    replaced = dict.fromkeys(("--gradvac", "--treatment UPGrad", "--no-pcgrad"), "--pcgrad")
    replaced |= {"--epochs 3": "", "--tensorboard": "", "--tasks sts sst": "--tasks para sts"}
    for flag, of in replaced.items():
        without = line.replace(of, "")
        assert replace(settings(f"{file} {flag}"), config="") == settings(f"{without} {flag}"), flag
    file = written(tmp_path / "run.toml", 'treatment = "CAGrad"\ntreatment_arguments = ["c=0.4"]')
    found = [settings(f"{file} {flag}".strip()) for flag in ("", "--treatment CAGrad", "--pcgrad", "--treatment MGDA")]
    assert [config.treatment_arguments for config in found] == [("c=0.4",), ("c=0.4",), (), ()]
    file = written(tmp_path / "run.toml", text)
    (found,) = problems(f"{file} --no-rdrop")  # the file's parameter does nothing then
    assert found == f"{file}: --rdrop_alpha: expected only with --rdrop"


def test_mixed_precision_may_be_switched_on_by_its_name_alone(tmp_path: Path) -> None:
    assert settings(written(tmp_path / "run.toml", "amp = true")).amp == settings("--amp").amp == "bf16"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('schedular = "pal"', "--schedular: unknown; did you mean --scheduler?"),
        ("pcgrad = 3", "--pcgrad: 3, expected true or false"),
        ("tensorboard = 'no'", "--tensorboard: 'no', expected true or false"),
        ("lr = true", "--lr: true, expected a value"),
        ("smart = true\nsmart_eta = false", "--smart_eta: false, expected a value"),
        ("batch-size = true", "--batch-size: true, expected a value"),
        ("[train]\nepochs = 3", "train: a table, expected flags and their values without tables"),
        ("out = {a = 1}", "out: a table, expected flags and their values without tables"),
        ("tasks = [{a = 1}]", "tasks: a table, expected flags and their values without tables"),
        ('epochs = "two"', "--epochs: invalid int value: 'two'"),
        ("epochs = 2.5", "--epochs: invalid int value: '2.5'"),
        ("epochs = -1", "--epochs -1: expected 1 or more"),
        ("lr = 1\nlr = 2", "not readable as TOML (Cannot overwrite a value (at end of document))"),
    ],
)
def test_a_wrong_settings_file_is_one_line(text: str, expected: str, tmp_path: Path) -> None:
    line = written(tmp_path / "run.toml", text)
    assert [found.removeprefix(f"{line}: ") for found in problems(line)] == [expected] != problems(line)


def test_a_wrong_flag_on_the_command_line_is_not_the_files(tmp_path: Path) -> None:
    line = written(tmp_path / "run.toml", "epochs = -1")
    expected = ["--epochs -2: expected 1 or more", "--lr -1.0: expected 0 or more"]
    assert problems(f"{line} --epochs -2 --lr -1") == expected


def test_a_file_that_holds_no_settings_is_one_line(tmp_path: Path) -> None:
    for name, text, words in (("x.json", "[]", "no settings of a run"), ("x.json", "{", "not readable as JSON")):
        (found,) = problems(written(tmp_path / name, text))
        assert found.startswith(f"--config {tmp_path / name}: {words}")
    assert problems(f"--config {tmp_path / 'none'}")[0].startswith(f"--config {tmp_path / 'none'}: No such file")


def test_the_settings_of_a_run_are_those_of_its_command_line(tmp_path: Path) -> None:
    """But for what does nothing there, such as the rate of a stage that is none."""
    line = "--pcgrad --tasks para sts --seed 3 --lr 1e-4 --pairs siamese --head mlp --name first --option finetune"
    run = replace(settings(f"{line} --out {tmp_path / 'run'}"), draws_per_step=16, threads=2, mlm_lr=1e-3)
    layout = {"layout": {"tasks": {}}, "stages": [], "commit": None, "gpu": None}
    file = written(tmp_path / "config.json", json.dumps({**run.to_dict(), **layout}))
    found = settings(file)
    assert {**found.to_dict(), "config": ""} == {**run.to_dict(), "out": "", "name": "", "mlm_lr": 0.0}
    found = settings(f"{file} --gradvac --gradvac_beta 0.5 --seed 4 --out new")
    assert (found.treatment, found.seed, found.out, found.pairs) == ("gradvac", 4, "new", "siamese")
    for key, value, expected in (
        ("epochs", 0, "--epochs 0"),
        ("epochs", "x", "invalid int"),
        ("epocs", 1, "--epochs?"),
        ("automatic", [0], "automatic 0 is '0'"),
        ("automatic", "lr", "automatic is 'lr', expected a list"),
    ):
        (problem,) = problems(written(tmp_path / "bad.json", json.dumps({**run.to_dict(), **layout, key: value})))
        assert expected in problem


@pytest.mark.parametrize(
    ("beside", "kept"),
    [
        ("--option pretrain", "--seed 3 --pretrain_lr 0.1 --augment eda --head mlp --mlp_layers 2"),
        ("--option test --checkpoint none", "--seed 3 --head mlp --mlp_layers 2"),
        ("--tasks sst", "--seed 3 --pretrain_lr 0.1 --augment eda --head mlp --mlp_layers 2 --average ema"
         " --ema_decay 0.9 --rdrop --rdrop_alpha 2"),
    ],
)  # fmt: skip
def test_what_does_nothing_with_the_flags_beside_a_run_is_left_out(beside: str, kept: str, tmp_path: Path) -> None:
    line = "--pcgrad --granularity layer --average ema --ema_decay 0.9 --task_weights sts=2 --rdrop --rdrop_alpha 2"
    line += " --seed 3 --pretrain_lr 0.1 --augment eda --head mlp --mlp_layers 2"
    values = {**settings(line).to_dict(), "layout": {"tasks": {}}}
    found = settings(f"{written(tmp_path / 'config.json', json.dumps(values))} {beside}")
    assert replace(found, config="").to_dict() == settings(f"{beside} {kept}").to_dict()


def test_a_settings_file_names_no_other(tmp_path: Path) -> None:
    line = written(tmp_path / "run.toml", 'config = "other.toml"')
    assert problems(line) == [f"{line}: --config: expected on the command line alone, leave it out"]


@pytest.mark.parametrize("line", cases("accepted.txt"))
def test_combinations_that_make_sense_are_accepted(line: str) -> None:
    parse(line.split())
