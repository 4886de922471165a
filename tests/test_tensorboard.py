"""TensorBoard's files of a run: tags by stage and task, the table of hyper-parameters, and steps of a resumed run."""

import json
from pathlib import Path
from typing import Any

import pytest

from run_record import METRICS, MetricsLog, RunDirectory, scalars

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(run: Path) -> Any:
    return accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = read(run)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected_points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What metrics.jsonl holds, by tag."""
    result: dict[str, list[tuple[int, float]]] = {}
    for line in (run / METRICS).read_text().splitlines():
        record = json.loads(line)
        for tag, value in scalars(record):
            result.setdefault(tag, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    return result


def record(stage: str, step: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "epoch": 1, "step": step, "losses": {"sst": step / 8}, "lr": 1 / step, **more}


def test_tags_name_the_stage_and_the_task() -> None:
    step = record(
        "finetune", 3, task="sst", loss=0.5, cosines={"sst-para": -0.25}, removed={"sst": 0.1}, draws={"sst": 2}
    )
    assert dict(scalars(step)) == {
        "finetune/loss/sst": 0.375, "finetune/cosine/sst-para": -0.25,
        "finetune/removed/sst": 0.1, "finetune/draws/sst": 2, "finetune/lr": 1 / 3,
    }  # fmt: skip
    dev = {"stage": "pretrain", "epoch": 1, "step": 3, "dev": {"sst": {"accuracy": 0.5}, "mean": 0.5}}
    assert dict(scalars(dev)) == {"pretrain/dev/sst/accuracy": 0.5, "pretrain/dev/mean": 0.5}


def test_a_run_of_the_command_has_all_its_numbers_in_tensorboard(treated_run: Path) -> None:
    found = points(treated_run)
    results = {tag for tag in found if tag.startswith("results/")}
    assert {tag: found[tag] for tag in found.keys() - results} == expected_points(treated_run)
    assert "finetune/loss" not in found  # the sum of the tasks' losses mixes their scales
    assert {"finetune/cosine/sst-para", "finetune/loss/sst", "finetune/dev/sst/accuracy", "pretrain/lr"} <= set(found)


def test_the_settings_are_shown_as_a_text(treated_run: Path) -> None:
    (tensor,) = read(treated_run).Tensors("config/text_summary")
    (shown,) = tensor.tensor_proto.string_val
    assert json.loads(shown) == json.loads((treated_run / "config.json").read_text())


def test_the_table_of_hyper_parameters_has_the_flags_and_the_final_scores(treated_run: Path) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    data = {tag: of.plugin_data for tag, of in read(treated_run).summary_metadata.items()}
    own = {tag: of.content for tag, of in data.items() if of.plugin_name == "hparams"}
    content = {tag: plugin_data_pb2.HParamsPluginData.FromString(value) for tag, value in own.items()}
    start = content["_hparams_/session_start_info"].session_start_info.hparams
    assert start["lr"].number_value > 0 and start["treatment"].string_value == "pcgrad"
    assert start["tasks"].string_value == "sst para sts" and start["smart"].string_value == "False"
    assert start["epochs"].number_value == 2
    results = json.loads((treated_run / "results.json").read_text())["dev"]
    metrics = {info.name.tag for info in content["_hparams_/experiment"].experiment.metric_infos}
    assert metrics == {"results/mean", *(f"results/{t}/{m}" for t in ("sst", "para", "sts") for m in results[t])}
    found = points(treated_run)
    assert found["results/sst/accuracy"] == [(0, pytest.approx(results["sst"]["accuracy"]))]
    assert found["results/mean"] == [(0, pytest.approx(results["mean"]))]
    assert len(list((treated_run / "tensorboard").iterdir())) == 1  # no folder of another run beside it


@pytest.mark.parametrize(("kept", "first"), [(4, 5), (10, 1), (13, 4), (14, 4), (15, 5)])
def test_a_resumed_run_has_each_step_once_and_keeps_the_stages_before(kept: int, first: int, tmp_path: Path) -> None:
    """kept: records before the checkpoint; the run logged three more before it was killed."""
    ends: list[dict[str, Any]] = [{"epoch": 1, "dev": {"mean": 1}, "stage": "pretrain", "step": 9}]
    ends += [{"epoch": 1, "dev": {"mean": 2}, "stage": "finetune", "step": 4}]
    log = [*(record("pretrain", i) for i in range(1, 10)), ends[0]]
    log += [*(record("finetune", i) for i in range(1, 5)), ends[1], *(record("finetune", i) for i in range(5, 9))]
    run = RunDirectory.create(tmp_path / "run", {})
    killed = run.open_metrics(0, tensorboard=True)
    size = 0
    for number, entry in enumerate(log[: kept + 3], 1):
        killed.write(entry)
        size = killed.state["metrics_size"] if number == kept else size
    killed.close()
    (events,) = (run.path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.0000000001.before"))  # files of one second have no sure order
    resumed = run.open_metrics(size, tensorboard=True)
    assert log[kept]["step"] == first
    for entry in log[kept:]:
        resumed.write(entry)
    resumed.close()
    assert points(run.path) == expected_points(run.path)
    assert len(expected_points(run.path)["pretrain/lr"]) == 9 and len(expected_points(run.path)["finetune/lr"]) == 8


def test_a_run_that_trains_nothing_has_its_table_and_one_without_tensorboard_has_none(tmp_path: Path) -> None:
    for folder in (tmp_path / "tensorboard", None):
        log = MetricsLog(tmp_path / METRICS, 0, folder)
        log.write_hyperparameters({"option": "test"}, {"mean": 0.5, "sts": {"pearson": float("nan")}})
        log.close()
    assert points(tmp_path) == {"results/mean": [(0, 0.5)]} and len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert {path.name for path in tmp_path.iterdir()} == {METRICS, "tensorboard"}
