"""Soups: the mean, the greedy recipe, the run that makes one, and what is no soup."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import multitask_classifier
import run as running
from checkpoints import save_checkpoint
from heads import MlpHead
from helpers import SPECIALS, WORDS, Capture, Patch, shaken, tiny_model, write_vocabulary
from model import Layout
from pal import ProjectedAttention
from parameters import Choice
from reports.report import main as report_main
from soup import greedy_soup, mean_state
from tasks import TASKS

PAL = Choice("pal", ProjectedAttention.Parameters(size=8, heads=2))
BIASES = (4.0, 0.0, -1.0, 1.0)  # of the heads of sts, one a checkpoint
Command = Callable[..., list[str]]


def write_model(folder: Path, seed: int = 0, bias: float = 0.0, words: Any = WORDS, **options: Any) -> Path:
    """A checkpoint; those of other seeds differ in every parameter."""
    options = {"adapter": PAL, "vocab_size": len(SPECIALS) + len(WORDS), **options}
    model = shaken(tiny_model(**options), seed)
    torch.nn.init.constant_(model.head_parameters("sts")["heads.sts.output.bias"], bias)
    save_checkpoint(model, write_vocabulary(folder, words), folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    parent = tmp_path_factory.mktemp("models")
    return [write_model(parent / str(seed), seed, bias) for seed, bias in enumerate(BIASES)]


@pytest.fixture
def command(data: Path, tmp_path: Path) -> Command:
    def arguments(*given: object, out: str = "run") -> list[str]:
        shared = ["--data", data, "--device", "cpu", "--cache", "off", "--no-tensorboard", "--out", tmp_path / out]
        return [str(part) for part in (*given, *shared)]

    return arguments


def assert_mean(out: Path, folders: list[Path]) -> None:
    found, *parts = (load_file(folder / "model.safetensors") for folder in (out / "best", *folders))
    assert any(".up." in name for name in found) and all(part.keys() == found.keys() for part in parts)
    for name, value in found.items():
        mean = torch.stack([part[name] for part in parts]).mean(0)
        torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-7)


def test_one_checkpoint_or_equal_ones_are_their_own_mean(folders: list[Path]) -> None:
    layout, expected = Layout(dict.fromkeys(TASKS, Choice("linear")), PAL), load_file(folders[0] / "model.safetensors")
    for number in (1, 3, 7):
        found = mean_state([folders[0]] * number, layout)
        names = [name for name in expected if not name.startswith("bert.")]
        assert all(torch.equal(found[name].float(), expected[name]) for name in names) and len(names) > 10


def test_in_a_mean_of_several_each_counts_the_same(folders: list[Path]) -> None:
    layout = Layout(dict.fromkeys(TASKS, Choice("linear")), PAL)
    found, parts = mean_state(folders[:3], layout), [mean_state([folder], layout) for folder in folders[:3]]
    for name, value in found.items():
        torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).mean(0))


def test_the_greedy_recipe_adds_from_the_best_down_what_does_not_lower_the_score() -> None:
    scores_of = {(1, 3): 0.89, (1, 2): 0.9, (1, 2, 4): 0.95, (1, 2, 4, 0): 0.94}
    assert greedy_soup([0.5, 0.9, 0.7, 0.8, 0.6], lambda numbers: scores_of.pop(tuple(numbers))) == [1, 2, 4]
    assert not scores_of and greedy_soup([0.5], lambda _: pytest.fail("nothing to add")) == [0]


def test_a_uniform_soup_is_the_mean_with_scores_predictions_and_a_report(
    folders: list[Path], command: Command, tmp_path: Path, capsys: Capture
) -> None:
    out, two = tmp_path / "run", folders[:2]
    assert multitask_classifier.main(command("--option", "soup", "--checkpoints", *two)) == 0
    shown = capsys.readouterr().out
    assert "uniform soup of 2 checkpoints" in shown and f"soup: mean of 2 of 2 checkpoints: {two[0]} {two[1]}" in shown
    assert_mean(out, two)
    results = json.loads((out / "results.json").read_text())
    assert [(part["checkpoint"], part["kept"]) for part in results["soup"]] == [(str(folder), True) for folder in two]
    tested = [*zip(two, (part["dev"] for part in results["soup"]), strict=True), (out, results["dev"])]
    for number, (folder, dev) in enumerate(tested):
        arguments = command("--option", "test", "--checkpoint", folder, out=f"test{number}")
        assert multitask_classifier.main(arguments) == 0
        expected = json.loads((tmp_path / f"test{number}" / "results.json").read_text())["dev"]
        assert json.dumps(dev) == json.dumps(expected)
    for path in (out / "predictions").iterdir():
        assert path.read_bytes() == (tmp_path / "test2" / "predictions" / path.name).read_bytes()
    capsys.readouterr()
    assert report_main([str(out)]) == 0
    assert f"soup of {two[0]} {two[1]}" in capsys.readouterr().out


def test_a_greedy_soup_keeps_what_does_not_lower_the_dev_mean(
    folders: list[Path], command: Command, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """The score is the nearness of a bias to 0.4: 0 alone is best, 0.5 with 1 better, then 0 with -1, 5 / 3 with 4."""

    def evaluate(model: Any, dev_rows: Any, *_: Any) -> Any:
        score = 1 - abs(model.heads["sts"].output.bias.item() - 0.4)
        return {task: {TASKS[task].output.selection_metric: score} for task in dev_rows}

    monkeypatch.setattr(running, "evaluate", evaluate)
    arguments = command("--option", "soup", "--soup", "greedy", "--checkpoints", *folders)
    assert multitask_classifier.main(arguments) == 0
    parts = json.loads((tmp_path / "run" / "results.json").read_text())["soup"]
    assert [part["kept"] for part in parts] == [False, True, False, True]
    assert [part["dev"]["mean"] for part in parts] == pytest.approx([1 - abs(bias - 0.4) for bias in BIASES])
    assert_mean(tmp_path / "run", [folders[1], folders[3]])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("soup with ")]
    assert [line.split(": dev ")[0].split()[-1] for line in lines] == [str(folders[i]) for i in (3, 2, 0)]


WIDE: Any = {"hidden_size": 48, "adapter": None}
OTHERS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: write_model(folder, **WIDE), "{first} {other}: hidden_size is 32 in the one and 48 in the other"),
    (
        lambda folder: write_model(folder, num_hidden_layers=3),
        "{first} {other}: num_hidden_layers is 2 in the one and 3",
    ),
    (lambda folder: write_model(folder, adapter=None), "{first} {other}: adapter name is pal in the one and None"),
    (
        lambda folder: write_model(folder, adapter=Choice("pal", ProjectedAttention.Parameters(size=4, heads=2))),
        "{first} {other}: adapter parameters size is 8 in the one and 4 in the other",
    ),
    (
        lambda folder: write_model(folder, head=Choice("mlp", MlpHead.Parameters(layers=1))),
        "{first} {other}: tasks sst head name is linear in the one and mlp in the other",
    ),
    (lambda folder: write_model(folder, words=WORDS[::-1]), "{first} {other}: checksum of the vocabulary is "),
    (
        lambda folder: write_model(folder, tasks=["sts", "sst"]),
        "{other}: no head of para, expected one of each of --tasks",
    ),
    (lambda folder: None, "{other}: no such directory, expected a run or a checkpoint folder"),
    (lambda folder: folder.mkdir(), "{other}/config.json: no such file"),
    (lambda folder: folder.symlink_to(folder.with_name("first")), "{first} {first}: expected each checkpoint once"),
]


@pytest.mark.parametrize(("write", "words"), OTHERS)
def test_what_makes_no_mean_is_one_line_with_both_directories_and_no_run(
    write: Callable[[Path], Any], words: str, folders: list[Path], command: Command, tmp_path: Path, capsys: Capture
) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    shutil.copytree(folders[0], first)
    write(other)
    assert multitask_classifier.main(command("--option", "soup", "--checkpoints", first, other)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words.format(first=first, other=other) in line and not (tmp_path / "run").exists()


def test_a_plain_encoder_has_no_heads_to_average(
    tiny: Path, folders: list[Path], command: Command, capsys: Capture
) -> None:
    assert multitask_classifier.main(command("--option", "soup", "--checkpoints", tiny, folders[0])) == 2
    assert f"{tiny}: no head of sst, para, sts" in capsys.readouterr().err
