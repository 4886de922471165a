"""The model card of a run, and the hub that gets it: a server on this machine."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from helpers import Capture, Patch
from predictor import load
from reports.finished_run import FinishedRun
from reports.model_card import model_card
from reports.report import main


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as an upload needs; keeps what it is sent by path."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server: Any = self.server
        if self.path == "/api/repos/create":
            server.made.append(json.loads(body))
            answer: Any = {"url": f"{server.address}/me/mine"}
        elif self.path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            answer = {"files": [{**file, "shouldIgnore": False} for file in files]}
        elif self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            server.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            answer = {"commitUrl": f"{server.address}/me/mine/commit/1", "commitOid": "1", "success": True}
        else:
            answer = {}
        self.reply(answer)

    def do_GET(self) -> None:
        self.reply({"id": "me/mine", "siblings": []})

    def reply(self, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: Patch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.made, server.status = {}, [], 200
    server.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.HF_HUB_OFFLINE", False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_the_card_holds_tasks_scores_and_settings(treated_run: Path) -> None:
    run = FinishedRun.read(treated_run)
    card = ModelCard(model_card(run, "me/mine"))
    results = card.data.eval_results
    assert results is not None
    found = {(result.dataset_type, result.metric_type): result.metric_value for result in results}
    dev = run.results["dev"]
    assert found == {(t, m): pytest.approx(v, abs=1e-4) for t in run.tasks for m, v in dev[t].items()}
    assert "very negative, negative, neutral" in card.text and f"{dev['mean']:.3f}" in card.text
    assert "treatment pcgrad" in card.text and str(treated_run) not in card.content


def test_the_card_says_how_it_was_trained(treated_run: Path) -> None:
    """Also what is off or 0 where one would think otherwise; nothing of methods that had no part in it."""
    run = FinishedRun.read(treated_run)
    flags = {"rdrop": True, "rdrop_alpha": 3.0, "pal": True, "copy_top_layers": 2, "pretrain_epochs": 0, "seed": 0}

    def settings_of(**changed: Any) -> list[str]:
        card = model_card(replace(run, config={**run.config, **changed}), "me/mine")
        return " ".join(card.partition("## Settings")[2].split()).split(", ")

    found = settings_of(**flags)
    assert {"rdrop", "rdrop_alpha 3.0", "pal", "copy_top_layers 2", "pretrain_epochs 0", "seed 0"} <= {*found}
    assert {"treatment pcgrad", "draws_per_step 4", "steps_per_epoch 3", "batch_size 4"} <= {*found}
    frozen = settings_of(**flags, option="pretrain", treatment="sum", pcgrad=False)
    assert {"option pretrain", "pretrain_lr 0.01", "pretrain_epochs 0"} <= {*frozen}
    assert not {"rdrop", "pal", "treatment sum", "epochs 2"} & {*frozen}


def test_the_card_tells_of_the_runs_before(treated_run: Path, tmp_path: Path) -> None:
    run = FinishedRun.read(treated_run)
    config = {**run.config, "treatment": "sum", "pcgrad": False, "pretrain_epochs": 25}
    for start, words in (
        (treated_run / "best", ["It began with run: option finetune, ", "treatment pcgrad", "Rows of data: sst train"]),
        (tmp_path / "gone", ["It began with gone, of which no more is known."]),
    ):
        card = model_card(replace(run, config={**config, "checkpoint": str(start)}), "me/mine")
        loaded = f'load(snapshot_download("me/mine"), max_length={config["max_length"]})'  # as the run reads texts
        assert f'{loaded}.predict("sst", ["a text"])' in card
        own, _, before = " ".join(card.partition("## Settings")[2].split()).partition("It began with ")
        assert "treatment sum" in own and "pretrain_" not in own and str(start.parent) not in card
        assert all(word in f"It began with {before}" for word in words)


def test_the_card_of_a_soup_says_so(treated_run: Path) -> None:
    run = FinishedRun.read(treated_run)
    of_soup = {"option": "soup", "soup": "greedy", "checkpoints": ["/runs/a", "/runs/b"], "pcgrad": False}
    mixed = [{"checkpoint": "/runs/a", "kept": False}, {"checkpoint": str(treated_run / "best"), "kept": True}]
    changed = {**run.config, **of_soup, "treatment": "sum"}
    card = model_card(replace(run, config=changed, results={**run.results, "soup": mixed}), "me/mine")
    assert "by which its checkpoints were chosen" in card and "greedy soup of 2 checkpoints" in card
    assert "\n1 of 2 are in the mean: run " in card
    settings, _, before = card.partition("## Settings")[2].partition("It began with run: ")
    assert not any(word in settings for word in ("seed", "epochs", "scheduler", "treatment", "/runs"))
    assert "treatment pcgrad" in before and "began with a" not in card, "what is not in the mean is not told of"


def test_a_card_of_the_sample_says_so(treated_run: Path) -> None:
    run = FinishedRun.read(treated_run)
    for data, name in (("sample", "SST-5 sentiment (the program's own sample)"), ("/data/sst", "SST-5 sentiment")):
        results = ModelCard(model_card(replace(run, config={**run.config, "data": data}), "me/mine")).data.eval_results
        assert results is not None and results[0].dataset_name == name


def test_a_push_is_the_best_checkpoint_with_its_card(
    treated_run: Path, hub: Any, tmp_path: Path, capsys: Capture
) -> None:
    assert main([str(treated_run), "--push", "me/mine"]) == 0
    assert capsys.readouterr().out.strip().endswith("/me/mine") and hub.made[0]["name"] == "mine"
    kept = {path.name: path.read_bytes() for path in (treated_run / "best").iterdir()}
    assert {*hub.files} == {*kept, "README.md"} and hub.files["model.safetensors"] == kept["model.safetensors"]
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert load(tmp_path).predict("sst", ["a film"]) == load(treated_run).predict("sst", ["a film"])
    assert not (treated_run / "best" / "README.md").exists()


def test_a_push_that_fails_is_one_line(treated_run: Path, hub: Any, capsys: Capture) -> None:
    hub.status = 403
    for name in ("me/mine", "a name/that/is none"):
        assert main([str(treated_run), "--push", name]) == 2
        shown = capsys.readouterr().err.strip()
        assert shown.startswith(f"error: --push {name}: the hub did not take it (") and "\n" not in shown
    copy = treated_run.parent / "copy"
    shutil.copytree(treated_run, copy)
    assert main([str(treated_run), str(copy), "--push", "x"]) == 2
    assert capsys.readouterr().err == "error: --push x: 2 runs, expected one\n"
    shutil.rmtree(copy)


def test_a_damaged_checkpoint_is_not_pushed(treated_run: Path, hub: Any, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(treated_run, tmp_path / "run")
    path = tmp_path / "run" / "best" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    for damage, words in ((lambda: path.write_bytes(content), "not as it was written"), (path.unlink, "missing")):
        damage()
        assert main([str(tmp_path / "run"), "--push", "me/mine"]) == 2
        assert capsys.readouterr().err == f"error: --push me/mine: {path}: {words} (SHA256SUMS)\n"
    assert not hub.files and not hub.made
