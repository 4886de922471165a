"""Flags: that they exist, their defaults and limits, and all contradictions are found before anything is loaded."""

from dataclasses import fields

import pytest

from config import DRAWS_WITH_TREATMENT, Config, FlagError, from_dict, make_parser, parse
from pcgrad import gramian_weightings
from schedulers import SCHEDULERS
from tasks import TASKS

PUBLIC_FLAGS = """
    option tasks model data out resume checkpoint scheduler draws_per_step pcgrad gradvac gradvac_beta treatment smart
    bregman pal pal_size augment drop_longest head_layers epochs pretrain_epochs steps_per_epoch batch_size
    accumulation_steps eval_batch_size save_every lr pretrain_lr warmup weight_decay max_grad_norm patience seed threads
    device amp task input output
"""


def settings(line: str) -> Config:
    return parse(line.split())


def problems(line: str) -> list[str]:
    """What is wrong with a command line, a problem a line."""
    with pytest.raises(FlagError) as caught:
        parse(line.split())
    return str(caught.value).split("\n")


@pytest.mark.parametrize("name", PUBLIC_FLAGS.split())
def test_every_flag_that_scripts_rely_on_exists(name: str) -> None:
    assert f"--{name}" in make_parser().format_help()


def test_every_flag_has_a_help_text_and_a_default_that_is_within_its_limits() -> None:
    for item in fields(Config):
        assert item.metadata["help"]
        if item.metadata["limits"]:
            assert not [p for p in _problems_or_none(f"--{item.name} {item.default}") if "expected a number" in p]


def _problems_or_none(line: str) -> list[str]:
    try:
        parse(line.split())
    except FlagError as error:
        return str(error).split("\n")
    return []


def test_defaults() -> None:
    config = parse([])
    assert (config.option, config.model, config.data) == ("finetune", "minilm", "sample")
    assert config.tasks == tuple(TASKS) == ("sst", "para", "sts")
    assert (config.treatment, config.smart, config.bregman, config.pal, config.amp) == (
        "sum",
        False,
        False,
        False,
        "off",
    )
    assert (config.accumulation_steps, config.max_grad_norm, config.device) == (1, 1.0, "auto")
    assert (config.smart_eps, config.smart_sigma, config.smart_eta, config.smart_steps) == (1e-5, 1e-5, 1e-3, 1)
    assert (config.gradvac_beta, config.eda_alpha, config.drop_longest) == (0.01, 0.1, 0.0)
    assert config.draws == 1


def test_a_given_value_reaches_the_settings_with_its_type() -> None:
    config = settings("--tasks sts sst --lr 3e-5 --epochs 2 --amp --no-tensorboard --smart --smart_weight 5")
    assert (config.tasks, config.lr, config.epochs, config.amp) == (("sts", "sst"), 3e-5, 2, "bf16")
    assert (config.tensorboard, config.smart, config.smart_weight) == (False, True, 5.0)


@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
def test_the_short_flag_is_the_treatment_of_its_name(name: str) -> None:
    assert parse([f"--{name}"]).treatment == parse(["--treatment", name]).treatment == name
    assert parse([f"--{name}", "--treatment", name]).treatment == name


def test_draws_of_a_step() -> None:
    assert settings("--scheduler pal --pcgrad").draws == DRAWS_WITH_TREATMENT == 16
    assert settings("--scheduler random --pcgrad").draws == 3
    assert settings("--scheduler round_robin --gradvac --tasks sst sts").draws == 2
    assert settings("--scheduler pal --pcgrad --draws_per_step 5").draws == 5
    assert settings("--draws_per_step 4").draws == 4


def test_settings_survive_the_run_directory() -> None:
    config = settings("--tasks para sts --scheduler random --gradvac --gradvac_beta 0.2 --amp fp16 --lr 1e-4")
    assert from_dict({**config.to_dict(), "versions": {"python": "3"}}) == config


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--gradvac --gradvac_beta 1.5", "--gradvac_beta 1.5: expected a number above 0 and at most 1"),
        ("--gradvac --gradvac_beta 0", "--gradvac_beta 0.0: expected a number above 0 and at most 1"),
        ("--smart --smart_eps 0", "--smart_eps 0.0: expected a number above 0"),
        ("--smart --smart_weight -1", "--smart_weight -1.0: expected a number above 0"),
        ("--smart --smart_steps 0", "--smart_steps 0: expected 1 or more"),
        ("--epochs 0", "--epochs 0: expected 1 or more"),
        ("--pretrain_epochs -1", "--pretrain_epochs -1: expected 0 or more"),
        ("--batch_size 0", "--batch_size 0: expected 1 or more"),
        ("--accumulation_steps 0", "--accumulation_steps 0: expected 1 or more"),
        ("--eval_batch_size 0", "--eval_batch_size 0: expected 1 or more"),
        ("--save_every -2", "--save_every -2: expected 0 or more"),
        ("--lr -1", "--lr -1.0: expected 0 or more"),
        ("--lr nan", "--lr nan: expected 0 or more"),
        ("--lr inf", "--lr inf: expected 0 or more"),
        ("--pretrain_lr 0", "--pretrain_lr 0.0: expected a number above 0"),
        ("--warmup 1", "--warmup 1.0: expected a number from 0 to below 1"),
        ("--drop_longest 1", "--drop_longest 1.0: expected a number from 0 to below 1"),
        ("--augment eda --eda_deletion_prob 1", "--eda_deletion_prob 1.0: expected a number above 0 and below 1"),
        ("--head_layers -1", "--head_layers -1: expected 0 or more"),
        ("--max_length 4", "--max_length 4: expected 0, or 5 or more"),
        ("--seed -1", "--seed -1: expected 0 or more"),
        ("--tasks sst sst", "--tasks sst sst: expected each task once"),
    ],
)
def test_a_value_outside_its_limits_is_named_with_what_is_allowed(line: str, words: str) -> None:
    found = problems(line)
    assert len(found) == 1 and found[0].startswith(words)


@pytest.mark.parametrize(
    "line", ["--option train", "--tasks sst emotion", "--scheduler fair", "--epochs two", "--nonsense", "--device gpu",
             "--amp fp8", "--augment swap", "--seed", "--epoch 3", "--pal_kind big"],
)  # fmt: skip
def test_a_value_that_no_flag_knows_is_one_line_with_the_flag(line: str) -> None:
    found = problems(line)
    assert len(found) == 1 and line.split()[0] in found[0]


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("--pcgrad --gradvac", "--pcgrad --gradvac --treatment"),
        ("--pcgrad --treatment gradvac", "--pcgrad --treatment"),
        ("--treatment sum --pcgrad", "--pcgrad --treatment"),
        ("--treatment nonsense", "--treatment"),
        ("--gradvac_beta 0.1", "--gradvac_beta"),
        ("--pcgrad --gradvac_beta 0.1", "--gradvac_beta"),
        ("--granularity layer", "--granularity"),
        ("--smart_eps 1e-4", "--smart_eps"),
        ("--smart_weight 2", "--smart_weight --smart"),
        ("--bregman_weight 2", "--bregman_weight --bregman"),
        ("--pal_size 8", "--pal_size --pal"),
        ("--pal_kind low_rank", "--pal_kind --pal"),
        ("--eda_alpha 0.2", "--eda_alpha --augment"),
        ("--wordnet somewhere", "--wordnet --augment"),
        ("--option pretrain --smart", "--smart --option"),
        ("--option pretrain --bregman", "--bregman --option"),
        ("--option pretrain --pcgrad", "--treatment --option"),
        ("--option pretrain --pal", "--pal --option"),
        ("--option individual_pretrain --pal", "--pal --option"),
        ("--option pretrain --epochs 3", "--epochs --option"),
        ("--option pretrain --lr 1e-3", "--lr --option"),
        ("--option pretrain --draws_per_step 2", "--draws_per_step --option"),
        ("--option pretrain --pretrain_epochs 0", "--pretrain_epochs --option"),
        ("--option individual_pretrain --scheduler random", "--scheduler"),
        ("--option test", "--option --checkpoint"),
        ("--option test --checkpoint x --pcgrad", "--treatment --option"),
        ("--option test --checkpoint x --smart", "--smart --option"),
        ("--option test --checkpoint x --pal", "--pal --option"),
        ("--option test --checkpoint x --augment eda", "--augment --option"),
        ("--option test --checkpoint x --drop_longest 0.02", "--drop_longest --option"),
        ("--option test --checkpoint x --scheduler random", "--scheduler --option"),
        ("--option test --checkpoint x --warmup 0.2", "--warmup --option"),
        ("--checkpoint x --pretrain_epochs 2", "--pretrain_epochs --checkpoint"),
        ("--checkpoint x --pretrain_lr 0.1", "--pretrain_lr"),
        ("--pretrain_epochs 0 --pretrain_lr 0.1", "--pretrain_lr"),
        ("--checkpoint x --model minilm", "--model --checkpoint"),
        ("--train pal", "--train --pal"),
        ("--train pal --pal --pcgrad", "--train --treatment"),
        ("--pcgrad --draws_per_step 2", "--draws_per_step"),
        ("--pcgrad --scheduler pal --draws_per_step 3", "--draws_per_step --scheduler"),
        ("--pcgrad --tasks sst", "--treatment --tasks"),
        ("--tasks sst --scheduler random", "--scheduler --tasks"),
        ("--patience 2 --eval_every 0", "--patience --eval_every"),
        ("--task sst", "--task --option predict"),
        ("--option test --checkpoint x --input y", "--input --option predict"),
        ("--option pretrain --output y", "--output --option predict"),
        ("--option predict --task sst", "--option predict --checkpoint"),
        ("--option predict --checkpoint x", "--option predict --task sst para sts"),
        *[
            (f"--option predict --checkpoint x --task sst {flag}", f"{flag.split()[0]} --option predict")
            for flag in (
                "--out y",
                "--data y",
                "--tasks sst",
                "--model minilm",
                "--seed 1",
                "--epochs 2",
                "--pcgrad",
                "--cache off",
                "--treatment nonsense",
                "--lr 1e-4",
                "--head_layers 1",
                "--pal",
                "--save_every 3",
                "--tensorboard",
            )
        ],
        ("--resume x --epochs 3", "--epochs --resume"),
        ("--resume x --option predict", "--option --resume"),
        ("--resume x --out y", "--out --resume"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_by_name(line: str, flags: str) -> None:
    found = problems(line)
    assert len(found) == 1
    assert all(flag in found[0] for flag in flags.split()), found


def test_all_problems_are_reported_at_once() -> None:
    found = problems("--epochs 0 --warmup 2 --gradvac_beta 7 --smart_eps 1e-4 --pal_size 8 --train pal --tasks sst sst")
    for name in ("--epochs", "--warmup", "--gradvac_beta", "--smart_eps", "--pal_size", "--train pal", "--tasks"):
        assert any(problem.startswith(name) for problem in found), (name, found)


@pytest.mark.parametrize(
    "line",
    [
        "--option finetune --scheduler pal --pcgrad",
        "--option pretrain --scheduler random --head_layers 2",
        "--option individual_pretrain --patience 3",
        "--option test --checkpoint x --eval_batch_size 16",
        "--checkpoint x --pal --train pal --epochs 2",
        "--smart --bregman --pal --gradvac --granularity layer --accumulation_steps 4 --amp fp16",
        "--tasks sst --smart",
        "--resume x --device cpu --threads 2",
        "--option predict --checkpoint x --task sts",
        "--option predict --checkpoint x --task sst --input - --output y --amp --device cpu --max_length 64",
        "--pcgrad --scheduler round_robin --draws_per_step 3",
    ],
)
def test_combinations_that_make_sense_are_accepted(line: str) -> None:
    parse(line.split())


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_treatment_goes_with_every_scheduler(scheduler: str) -> None:
    for treatment in ("pcgrad", "gradvac", *gramian_weightings()):
        assert parse(["--scheduler", scheduler, "--treatment", treatment]).treatment == treatment


def test_a_weighting_is_refused_where_torchjd_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("config.gramian_weightings", lambda: [])
    (found,) = problems("--treatment UPGrad")
    assert "torchjd" in found and "pcgrad" in found
