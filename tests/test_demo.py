"""The page of an exported model, in a real browser: its token ids, its answers, and that it opens without network."""

import json
import queue
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import multitask_classifier
from checkpoints import find_checkpoint
from datasets import Tokenizer
from demo.build import PAGE, build, fetch_runtime, fill_worker, main
from helpers import WORDS, Capture, Patch
from reports.command import ReportError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
CHECK = """<script type="module">
const address = "ADDRESS";
const given = await (await fetch(address)).json();
while (!globalThis.demo) await new Promise((resolve) => setTimeout(resolve, 20));
const found = [];
for (const texts of given) found.push(texts.answer ? await demo.answer(texts.answer) : demo.encode(texts));
await navigator.serviceWorker.ready;
const shown = document.body.innerText;
await fetch(address, { method: "POST", mode: "no-cors", body: JSON.stringify({ found, shown }) });
</script></body>"""


class Quiet:
    def log_message(self, format: str, *args: Any) -> None:
        pass


class Static(Quiet, SimpleHTTPRequestHandler):
    """The page, with a script more at its end."""

    def do_GET(self) -> None:
        if self.path != "/":
            return super().do_GET()
        server: Any = self.server
        page = (Path(self.directory) / "index.html").read_text("utf-8").replace("</body>", server.check)
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page.encode())


class Checks(Quiet, BaseHTTPRequestHandler):
    """What the script is given, and what it has found."""

    def do_GET(self) -> None:
        server: Any = self.server
        self.send_response(200)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.end_headers()
        self.wfile.write(json.dumps(server.given).encode())

    def do_POST(self) -> None:
        server: Any = self.server
        server.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()


@contextmanager
def serving(handler: Callable[..., Any]) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.address = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def browse(address: str, checks: Any, profile: Path) -> Any:
    """Opens the page in a browser until its script has found something."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    with subprocess.Popen([str(CHROMIUM), *flags, address], stderr=subprocess.DEVNULL) as browser:
        try:
            return checks.found.get(timeout=90)
        finally:
            browser.terminate()


def on_page(page: Path, given: Any, profile: Path, again: bool = False) -> list[Any]:
    """What the page's script finds; with `again` a second time, when no server is there."""
    with serving(Checks) as checks:
        checks.given, checks.found = given, queue.Queue()
        with serving(partial(Static, directory=str(page))) as static:
            static.check = CHECK.replace("ADDRESS", checks.address)
            found = [browse(static.address, checks, profile)]
        return [*found, browse(static.address, checks, profile)] if again else found


def hostile_texts(number: int) -> list[str]:
    """Random texts of any characters, of words, accents, special tokens, far too long words and blanks."""
    draw = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]

    def of(first: int, last: int) -> str:
        return chr(draw.randrange(first, last))

    kinds: list[Callable[[], str]] = [
        lambda: chr(draw.choice(points)),
        lambda: of(0, 0x3000),
        lambda: draw.choice("aeiouyAEIOUSZ") + of(0x300, 0x370) + draw.choice(["", of(0x300, 0x370)]),
        lambda: draw.choice(["the", "film", "Unbelievable", "isn't", "naïve", "İstanbul", "ΣΊΣΥΦΟΣ", "straße", "ﬁnal"]),
        lambda: draw.choice(["[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "[ SEP ]", "[sep]", "##ing", "[unused1]"]),
        lambda: draw.choice(" \t\n\r\u00a0\u200b\u2028\u3000\x00\ufffd\ufeff"),
        lambda: draw.choice("!?.,;:'\"-–—…()$€^`~|<>@#%&*"),
        lambda: of(0xAC00, 0xD7A4) + of(0x4E00, 0x9FFF) + of(0x1F300, 0x1FA00),
        lambda: draw.choice("abcxyz") * draw.choice([99, 100, 101, 300]),
    ]
    return ["".join(draw.choice(kinds)() for _ in range(draw.randrange(1, 14))) for _ in range(number)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Patch) -> Path:
    """As much of an export as the page's tokenizer needs, and no onnxruntime."""
    monkeypatch.setattr("demo.build.fetch_runtime", lambda folder: None)
    tokenizer = Tokenizer(find_checkpoint("minilm"), 64)
    tokenizer.save(tmp_path / "tokenizer.json")
    labels = {"max_length": 64, "special_tokens": tokenizer.special_tokens, "tasks": {}}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "model.int8.onnx").touch()
    return tmp_path


@needs_browser
def test_the_page_makes_the_programs_token_ids_of_10000_hostile_strings(folder: Path, tmp_path: Path) -> None:
    texts = hostile_texts(10_000)
    single, pairs = [(text,) for text in texts[:5000]], list(zip(texts[5000:7500], texts[7500:], strict=True))
    [given] = on_page(build(folder, "model.int8.onnx"), [*single, *pairs], tmp_path / "profile")
    tokenizer = Tokenizer(find_checkpoint("minilm"), 64)
    for rows, found in ((single, given["found"][:5000]), (pairs, given["found"][5000:])):
        expected = tokenizer.encode(rows)
        ids = np.split(expected.ids, np.cumsum(expected.lengths)[:-1])
        for row, of_row, of_program, first in zip(rows, found, ids, expected.firsts, strict=True):
            assert (of_row["ids"], of_row["first"]) == (of_program.tolist(), first), repr(row)


@needs_browser
@pytest.mark.parametrize("flags", ["", "--pairs siamese --tasks sst sts"])
def test_the_page_gives_the_graphs_answers_also_without_network(
    flags: str, tiny: Path, data: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """(The smaller forms, times and memory: test_export.py.)"""
    pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
    from onnx_answers import answers, open_session

    monkeypatch.setattr("export.SMALLER", {})
    monkeypatch.setattr("export.measure_memory", lambda paths: 1)
    monkeypatch.setattr("onnx_proof.TURNS", 1)
    run, pair_tasks = tmp_path / "run", {"sts"} if flags else {"para", "sts"}
    few = "--epochs 1 --pretrain_epochs 1 --steps_per_epoch 2 --batch_size 4 --cache off --device cpu"
    arguments = [*few.split(), *flags.split(), "--model", str(tiny), "--data", str(data), "--out", str(run)]
    assert multitask_classifier.main(arguments) == 0
    assert multitask_classifier.main(["--option", "export", "--checkpoint", str(run), "--max_loss", "1"]) == 0
    try:
        page = build(run / "export", "model.onnx")
    except ReportError as error:
        pytest.skip(str(error))
    draw = np.random.default_rng(0)
    rows = [tuple(" ".join(draw.choice(WORDS, draw.integers(2, 9))) for _ in range(1 + i % 2)) for i in range(20)]
    shown = on_page(page, [{"answer": row} for row in rows], tmp_path / "profile", again=not flags)
    session = open_session(run / "export" / "model.onnx")
    for found in shown:
        assert "ms for all answers" in found["shown"] and "SST-5 sentiment" in found["shown"]
        for row, of_row in zip(rows, found["found"], strict=True):
            assert of_row["answers"].keys() == {"sst"} | (pair_tasks if len(row) == 2 else set())
            for task, values in of_row["answers"].items():
                tokenizer = Tokenizer(run / "export", 512, bool(flags) and task != "sst")
                tokens = tokenizer.encode([row[:1] if task == "sst" else row])
                expected = answers(session, task, tokens)[0]
                np.testing.assert_allclose(values, np.atleast_1d(expected), atol=1e-4)


def test_the_worker_keeps_every_file_under_a_name_that_changes_with_any(tmp_path: Path) -> None:
    names = set()
    for model in (b"one", b"one", b"another"):
        page = shutil.copytree(PAGE, tmp_path / str(len(list(tmp_path.iterdir()))))
        (page / "model.onnx").write_bytes(model)
        fill_worker(page)
        name, files = re.findall(r"^const \w+ = (.*?);", (page / "sw.js").read_text("utf-8"), re.MULTILINE)
        assert json.loads(files) == ["./", *sorted(path.name for path in page.iterdir() if path.name != "sw.js")]
        names.add(name)
    assert len(names) == 2


@pytest.mark.parametrize(
    "kind", ["existing", "no model", "other models", "no npm", "npm refuses", "another tokenizer", "cut"]
)
def test_what_cannot_be_built_is_one_line_and_leaves_nothing(
    kind: str, folder: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    if kind == "existing":
        (folder / "demo").mkdir()
        words = f"{folder / 'demo'}: exists already, expected a new directory"
    elif kind == "no model":
        (folder / "model.int8.onnx").unlink()
        words = f"{folder}: no model.int8.onnx, expected a folder that --option export wrote"
    elif kind == "other models":
        (folder / "model.int8.onnx").rename(folder / "model.small.onnx")
        (folder / "model.onnx").touch()
        words = f"{folder}: no model.int8.onnx, expected --model to name one of model.onnx, model.small.onnx"
    elif kind == "another tokenizer":
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
        words = f"{folder / 'tokenizer.json'}: BPE, expected the word pieces of a BERT"
    elif kind == "cut":
        (folder / "tokenizer.json").write_text("{")
        words = f"{folder / 'tokenizer.json'}: no tokenizer (EOF while parsing an object at line 1 column 1)"
    else:
        monkeypatch.setattr("demo.build.fetch_runtime", fetch_runtime)
        words = "npm is not installed; the page takes onnxruntime from it (https://nodejs.org)"
        monkeypatch.setenv("PATH", str(folder))
        if kind == "npm refuses":
            (folder / "npm").write_text("#!/bin/sh\necho 'no such host' >&2\nexit 1\n")
            (folder / "npm").chmod(0o755)
            monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
            words = "npm does not give onnxruntime-web@1.30.0 (no such host)"
    before = sorted(folder.iterdir())
    assert main([str(folder)]) == 2
    assert capsys.readouterr().err == f"error: {words}\n" and sorted(folder.iterdir()) == before
