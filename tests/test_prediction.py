"""Predictions for new texts: those of the prediction files, line by line, streamed; broken lines cost no other line."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.special import expit, softmax

import multitask_classifier
import prediction
from bert import initialize
from checkpoints import load_model, save_checkpoint
from datasets import Batch, Tokenizer, read_examples
from heads import HEADS
from helpers import (
    LINEAR,
    ROOT,
    THREE,
    WORDS,
    Capture,
    Patch,
    generator,
    pack,
    shaken,
    tiny_model,
    write_vocabulary,
)
from model import Layout
from parameters import Choice, parameters_type
from prediction import LINE_BYTES, PredictionError, chunks_of_lines, texts_of_line
from predictor import Predictor, load
from tasks import TASKS

Lines, Line = Callable[..., list[str]], Callable[..., str]


@pytest.fixture(scope="module")
def start_point(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A checkpoint with random heads that predict every class."""
    folder, layout = tmp_path_factory.mktemp("start"), Layout(dict.fromkeys(TASKS, LINEAR))
    bert = load_model(tiny, layout, generator()).model
    initialize(bert.heads, 1.0, generator(2))
    predictor = Predictor(bert, Tokenizer(tiny, 64), torch.device("cpu"), 64, nullcontext)
    for task in THREE:
        middle = np.median(logits_of(predictor, task, random_rows(task, 30)), 0)
        bias: torch.Tensor = bert.get_parameter(f"heads.{task}.output.bias").data
        bias.add_(2.5 * (task == "sts") - torch.from_numpy(middle))
    save_checkpoint(bert, tiny, folder)
    return folder


def train(out: Path, start_point: Path, data: Path, flags: str = "") -> Path:
    """A run of one step."""
    line = f"--checkpoint {start_point} --data {data} --out {out} --device cpu --cache off --no-tensorboard "
    line += f"--epochs 1 --steps_per_epoch 1 --lr 1e-6 {flags}"
    assert multitask_classifier.main(line.split()) == 0
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, start_point: Path, data: Path) -> Path:
    """The directory of a run."""
    return train(tmp_path_factory.mktemp("runs") / "run", start_point, data)


@pytest.fixture(scope="module")
def siamese(tmp_path_factory: pytest.TempPathFactory, tiny: Path, data: Path) -> Path:
    """A run whose heads read the mean of each sentence."""
    out = tmp_path_factory.mktemp("runs") / "run"
    line = f"--option pretrain --model {tiny} --data {data} --out {out} --device cpu --cache off --no-tensorboard "
    line += "--pretrain_epochs 2 --pretrain_lr 0.1 --pooling mean --pairs siamese"
    assert multitask_classifier.main(line.split()) == 0
    return out


def dev_rows(data: Path, task: str) -> list[tuple[str, ...]]:
    file = read_examples(data / TASKS[task].file_name("dev"), TASKS[task], labelled=True)
    return [example.texts for example in file.examples]


def random_rows(task: str, num_rows: int) -> list[tuple[str, ...]]:
    """Texts of very different lengths."""
    draw, num_texts = np.random.default_rng(7), len(TASKS[task].text_columns)
    texts = [" ".join(draw.choice(WORDS, draw.integers(1, 25))) for _ in range(num_rows * num_texts)]
    return [tuple(texts[i : i + num_texts]) for i in range(0, len(texts), num_texts)]


def content(rows: Sequence[tuple[str, ...]]) -> bytes:
    return "".join("\t".join(row) + "\n" for row in rows).encode()


def arguments(run: Path, task: str, **flags: Any) -> list[str]:
    given = {"option": "predict", "checkpoint": run, "task": task, "device": "cpu", **flags}
    return [part for name, value in given.items() for part in (f"--{name}", *([] if value is True else [str(value)]))]


@pytest.fixture
def predicted(trained: Path, tmp_path: Path) -> Lines:
    """The lines that the command makes of a text."""

    def predicted(task: str, text: bytes, run: Path = trained, status: int = 0, **flags: Any) -> list[str]:
        source, target = tmp_path / "input.txt", tmp_path / "output.tsv"
        source.write_bytes(text)
        target.unlink(missing_ok=True)
        assert multitask_classifier.main(arguments(run, task, input=source, output=target, **flags)) == status
        *lines, end = target.read_text().split("\n")
        assert end == ""
        return lines

    return predicted


def numbers(lines: Sequence[str]) -> np.ndarray:
    """The values, and probabilities where there are some, of output lines that are not empty."""
    return np.array([line.split("\t") for line in lines if line.strip()], float)


@pytest.fixture
def error_line(trained: Path, capsys: Capture) -> Line:
    """The one line of a command that fails and writes nothing."""

    def error_line(task: str = "sst", run: Path = trained, **flags: Any) -> str:
        capsys.readouterr()
        assert multitask_classifier.main(arguments(run, task, **flags)) == 2
        shown = capsys.readouterr()
        (line,) = shown.err.splitlines()
        assert shown.out == "" and line.startswith("error: ")
        return line.removeprefix("error: ")

    return error_line


def values_of_file(run: Path, task: str) -> list[str]:
    lines = (run / "predictions" / f"{task}-dev-output.csv").read_text().splitlines()[1:]
    return [line.rsplit(" , ", 1)[1].removesuffix(" ") for line in lines]


@pytest.mark.parametrize("task", THREE)
def test_predictions_are_those_of_the_runs_prediction_file(
    task: str, predicted: Lines, trained: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    capsys.readouterr()
    lines = predicted(task, content(dev_rows(data, task)))
    expected = values_of_file(trained, task)
    assert len(set(expected)) > 1
    assert [line.split("\t")[0] for line in lines] == expected
    assert {path.name for path in tmp_path.iterdir()} == {"input.txt", "output.tsv"}
    assert capsys.readouterr() == ("", "")


def test_a_checkpoint_is_predicted_with_as_it_was_trained(
    predicted: Lines, siamese: Path, data: Path, tmp_path: Path
) -> None:
    run = train(tmp_path / "again", siamese, data, "--lr 1e-12")
    for task in THREE:
        expected = values_of_file(siamese, task)
        assert [line.split("\t")[0] for line in predicted(task, content(dev_rows(data, task)), siamese)] == expected
        assert values_of_file(run, task) == expected


@pytest.mark.parametrize("task", THREE)
def test_the_probability_is_that_of_the_predicted_answer_and_the_python_form_gives_the_same(
    task: str, predicted: Lines, trained: Path
) -> None:
    """Against SciPy on the logits of each row alone."""
    rows = random_rows(task, 20)
    lines, alone = predicted(task, content(rows)), logits_of(load(trained, "cpu"), task, rows)
    predictor, texts = load(str(trained / "best"), device="cpu"), [row[0] for row in rows] if task == "sst" else rows
    values = predictor.predict(task, texts)
    if task == "sts":
        assert numbers(lines) == pytest.approx(alone.clip(0, 5), abs=1e-5)
        assert [f"{value:.6f}" for value in values] == lines
        return
    p = softmax(alone, -1) if task == "sst" else np.stack([1 - expit(alone[:, 0]), expit(alone[:, 0])], 1)
    assert values == p.argmax(1).tolist() and len(set(values)) > 1 and type(values[0]) is int
    assert numbers(lines)[:, 1] == pytest.approx(p.max(1), abs=2e-6)
    pairs = predictor.predict(task, texts, probabilities=True)
    assert [f"{value}\t{p:.6f}" for value, p in pairs] == lines and [value for value, _ in pairs] == values


@pytest.mark.parametrize("task", ["sst", "para"])
def test_with_names_a_line_says_what_its_class_is_called(task: str, predicted: Lines) -> None:
    text = content(random_rows(task, 20))
    plain, named = predicted(task, text), predicted(task, text + b" \n", status=1, names=True)
    names = ("very negative", "negative", "neutral", "positive", "very positive") if task == "sst" else ("no", "yes")
    assert named == [*(f"{line}\t{names[int(line[0])]}" for line in plain), "\t\t"]


def logits_of(predictor: Predictor, task: str, rows: Sequence[tuple[str, ...]]) -> np.ndarray:
    """(R, K) logits, each row in a batch of its own, from the model and tokenizer alone."""
    parts = []
    with torch.no_grad():
        for row in rows:
            tokens = predictor.tokenizer.encode([row])
            packed = pack([tokens.ids], [np.arange(len(tokens.ids)) >= tokens.firsts[0]])
            parts.append(predictor.model(task, Batch(torch.zeros(1), tokens=packed)))
    return np.asarray(torch.cat(parts))


@pytest.mark.parametrize("task", THREE)
def test_predictions_come_in_the_order_of_the_input_whatever_the_chunks(
    task: str, predicted: Lines, trained: Path, monkeypatch: Patch
) -> None:
    rows = random_rows(task, 30)
    whole = predicted(task, content(rows))
    assert len(set(whole)) > 5
    for at_a_time in (1, 7):
        monkeypatch.setattr(prediction, "TEXTS_AT_A_TIME", at_a_time)
        np.testing.assert_allclose(
            numbers(whole), numbers(predicted(task, content(rows), eval_batch_size=4)), atol=5e-6
        )
    sizes, predictor = list[int](), load(trained, "cpu", batch_size=8)
    forward = predictor.model.forward
    monkeypatch.setattr(predictor.model, "forward", lambda task, of: sizes.append(len(of)) or forward(task, of))
    predictor.predict(task, [row[0] for row in rows] if task == "sst" else rows)
    assert sizes == [8, 8, 8, 6]


def test_rows_are_cut_as_in_the_run(predicted: Lines, start_point: Path, data: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", start_point, data, "--max_length 7 --tasks sts")
    text, expected = content(dev_rows(data, "sts")), values_of_file(run, "sts")
    for folder in (run, run / "best", run / "last"):
        assert predicted("sts", text, folder) == expected
    assert predicted("sts", text, run, max_length=64) != expected
    (run / "config.json").write_text('{"max_length": 20}')  # no run's
    assert load(run / "best").tokenizer.max_length == 64
    with pytest.raises(ValueError, match=r"max_length 65: .* has 64 positions"):
        load(run, max_length=65)


def test_the_python_form_needs_texts_of_the_tasks_form(trained: Path) -> None:
    predictor = load(trained, "cpu")
    assert predictor.predict("sst", []) == []
    cases: list[tuple[str, Any, str]] = [
        ("sst", "a fine film", "texts is the string 'a fine film', expected a list"),
        ("sst", ["a film", None], r"texts\[1\] is None, expected a string"),
        ("sts", ["a film"], r"texts\[0\] is 'a film', expected a pair of strings"),
        ("sts", [("a", 3)], "expected a pair of strings"),
        ("sst", ["fine", " "], r"texts\[1\] is ' ', expected a string with some text"),
        ("mood", ["fine"], "task 'mood': the checkpoint has heads for sst, para, sts"),
    ]
    for task, texts, message in cases:
        with pytest.raises(ValueError, match=message):
            predictor.predict(task, texts)
    with pytest.raises(ValueError, match="task 'sts': a score has no probability"):
        predictor.predict("sts", [("a", "b")], probabilities=True)


@pytest.mark.parametrize("kind", ["trained", "siamese"])
def test_a_text_is_encoded_as_transformers_pools_it(kind: str, request: pytest.FixtureRequest) -> None:
    """By the pooler, and by the mean over all tokens of runs that read sentences so; a pair's task reads the same."""
    run: Path = request.getfixturevalue(kind)
    predictor, bert = load(run, "cpu"), transformers.BertModel.from_pretrained(run / "best").eval()
    texts = [row[0] for row in random_rows("sst", 9)]
    found = predictor.encode(texts)
    assert found.shape == (9, 32) and found.dtype == np.float32 and predictor.encode([]).shape == (0, 32)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = bert(torch.from_numpy(predictor.tokenizer.encode([(text,)]).ids).long()[None])
        expected = states.pooler_output[0] if kind == "trained" else states.last_hidden_state[0].mean(0)
        assert vector == pytest.approx(expected.numpy(), abs=1e-5)
    assert predictor.encode(texts, "sts") == pytest.approx(found, abs=1e-6)
    with pytest.raises(ValueError, match=r"texts\[0\] is \('a', 'b'\), expected a string"):
        predictor.encode([("a", "b")])  # type: ignore[list-item]


@pytest.mark.parametrize("head", ["lstm", "routing"])
def test_a_text_is_encoded_whatever_its_heads_read(head: str, tmp_path: Path) -> None:
    parameters = parameters_type(HEADS[head])
    folder, model = write_vocabulary(tmp_path / "model"), tiny_model(head=Choice(head, parameters()))
    save_checkpoint(shaken(model), folder, folder)
    predictor, bert = load(folder, "cpu"), transformers.BertModel.from_pretrained(folder).eval()
    texts = ["a fine film", "the plot"]
    for text, vector in zip(texts, predictor.encode(texts), strict=True):
        with torch.no_grad():
            states = bert(torch.from_numpy(predictor.tokenizer.encode([(text,)]).ids).long()[None])
        assert vector == pytest.approx(states.pooler_output[0].numpy(), abs=1e-5)


def test_texts_of_a_line_and_what_is_wrong_with_one() -> None:
    assert texts_of_line("schön \u2028\x0b\x85 a\r".encode(), TASKS["sst"]) == ("schön \u2028\x0b\x85 a",)
    assert texts_of_line(b'"a\t b ', TASKS["sts"]) == ('"a', " b ")
    assert texts_of_line(b"a\t", TASKS["para"]) == ("a", "")
    for task, line, message in (
        ("sst", b" \t ", "the line is empty, expected sentence"),
        ("sst", b"a\tfilm", "1 tab, expected 0: sentence"),
        ("sst", b"fi\xfflm", "byte 0xff is not valid UTF-8, expected UTF-8"),
        ("sst", b"a" * (LINE_BYTES + 1), "longer than 1048576 bytes, expected sentence"),
        ("para", b"a film", "0 tabs, expected 1: sentence1 <tab> sentence2"),
        ("sts", b"a\tb\tc", "2 tabs, expected 1: sentence1 <tab> sentence2"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            texts_of_line(line, TASKS[task])


@pytest.mark.parametrize("task", ["sts", "para"])
def test_broken_lines_are_named_and_left_empty_and_the_others_predicted(
    task: str, predicted: Lines, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(prediction, "TEXTS_AT_A_TIME", 3)  # of the chunks one is broken in whole
    good = random_rows(task, 5)
    lines = [content([row]).strip() for row in good]
    broken = [lines[0], b"no tab", lines[1], b"", b"\xff\tx", b"a\tb\tc", lines[2], lines[3], b"", lines[4]]
    found = predicted(task, b"\n".join(broken), status=1)
    empty = "" if task == "sts" else "\t"
    assert [number for number, line in enumerate(found, 1) if line == empty] == [2, 4, 5, 6, 9]
    messages = capsys.readouterr().err.splitlines()
    start = f"error: {tmp_path / 'input.txt'}:"
    assert [message.removeprefix(start).split(":")[0] for message in messages] == ["2", "4", "5", "6", "9"]
    alone = predicted(task, b"\n".join(lines))
    np.testing.assert_allclose(numbers(found), numbers(alone), atol=5e-6)


@pytest.mark.parametrize("is_siamese", [False, True])
def test_lines_of_which_the_model_reads_a_part_are_counted(
    is_siamese: bool,
    predicted: Lines,
    siamese: Path,
    trained: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: Patch,
) -> None:
    """A word is a token. Of two sentences in a sequence ten tokens are left to words, of one of its own eleven."""
    monkeypatch.setattr(prediction, "TEXTS_AT_A_TIME", 2)
    rows = [(11, 0), (5, 5), (5, 6), (12, 1), (1, 1), (11, 11)]
    lines = ["\t".join(" ".join([WORDS[-1]] * max(number, 1)) for number in row) for row in rows]
    predicted("sts", "\n".join(lines).encode(), siamese if is_siamese else trained, max_length=13)
    found = (
        "1 line of more than 13 tokens, first line 4" if is_siamese else "4 lines of more than 13 tokens, first line 1"
    )
    words = f"warning: {tmp_path / 'input.txt'}: {found}; what is beyond was not read\n"
    assert capsys.readouterr().err == words


def test_line_ends_of_windows_a_byte_order_mark_and_a_missing_last_line_feed_change_nothing(predicted: Lines) -> None:
    text = content(random_rows("sst", 5))
    expected = predicted("sst", text)
    assert predicted("sst", b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n")) == expected
    assert predicted("sst", text.removesuffix(b"\n")) == expected
    assert predicted("sst", b"\xef\xbb\xbf\n" + text, status=1)[0] == "\t"  # a mark is no text
    assert predicted("sst", b"") == []


def lines_of(text: bytes, folder: Path) -> list[list[bytes]]:
    (folder / "input").write_bytes(text)
    return list(chunks_of_lines(io.FileIO(folder / "input"), "input"))


@pytest.mark.parametrize("block", [1, 2, 5, 1 << 16])
def test_lines_are_those_of_the_file(block: int, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(prediction, "BLOCK_BYTES", block)
    for at_a_time in (1, 2, 100):
        monkeypatch.setattr(prediction, "TEXTS_AT_A_TIME", at_a_time)
        for text in (b"", b"\n", b"a", b"a\nbb\n", b"\n\na\n\nbcd", b"\n\n\n"):
            chunks = lines_of(text, tmp_path)
            expected = list(io.BytesIO(text + b"\n" * (text[-1:] > b"\n")))
            assert [line + b"\n" for chunk in chunks for line in chunk] == expected
            assert all(len(chunk) == at_a_time for chunk in chunks[:-1])


def test_a_line_without_end_is_cut_and_chunks_of_long_lines_hold_fewer_of_them(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    ((first, last),) = lines_of(b"a" * (3 * LINE_BYTES) + b"\nb\n", tmp_path)
    assert LINE_BYTES < len(first) < 2 * LINE_BYTES and last == b"b"
    monkeypatch.setattr(prediction, "CHUNK_BYTES", 1 << 17)
    chunks = lines_of((b"a" * 1000 + b"\n") * 1000, tmp_path)
    assert [len(line) for chunk in chunks for line in chunk] == [1000] * 1000
    assert len(chunks) > 4 and max(map(len, chunks)) <= 150


def test_a_line_from_a_pipe_does_not_wait_for_the_next_and_lines_that_come_together_stay_together() -> None:
    descriptor, writer = os.pipe()
    chunks = chunks_of_lines(io.FileIO(descriptor), "pipe")
    for sent, expected in ((b"a\nb\nc", [b"a", b"b"]), (b"d\n", [b"cd"]), (b"e\n", [b"e"])):
        os.write(writer, sent)
        started = time.monotonic()
        assert next(chunks) == expected
        assert time.monotonic() - started < 5
    threading.Timer(0.02, os.write, (writer, b"g\n")).start()
    os.write(writer, b"f\n")
    assert next(chunks) == [b"f", b"g"]
    os.close(writer)
    assert next(chunks, None) is None


def test_an_input_or_output_that_cannot_be_used_is_one_line(
    error_line: Line, tmp_path: Path, monkeypatch: Patch
) -> None:
    absent, out, none = tmp_path / "absent", tmp_path / "absent" / "out", "No such file or directory"
    assert error_line(input=absent) == f"--input {absent}: {none}, expected a file with a text a line"
    assert error_line(input=__file__, output=out) == f"--output {out}: {none}"
    assert "Is a directory" in error_line(input=tmp_path)
    monkeypatch.setattr(multitask_classifier, "load", lambda *_: pytest.fail("the model was loaded"))
    (out := tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert error_line(input=__file__, output=out) == f"--output {out}: exists already, expected a new file"
    assert not (tmp_path / "nowhere").exists()
    monkeypatch.setattr(os, "read", lambda *_: os.stat(absent))  # fails later
    with pytest.raises(PredictionError, match=f"input: {none}"):
        lines_of(b"a\n", tmp_path)


def test_a_checkpoint_without_the_head_is_refused(
    error_line: Line, tiny: Path, start_point: Path, data: Path, tmp_path: Path
) -> None:
    single = train(tmp_path / "run", start_point, data, "--tasks sst sts")
    refused = {tiny: "without heads", single: "has heads for sst, sts only", tmp_path / "absent": "no such directory"}
    for run, reason in refused.items():
        assert reason in error_line("para", run, input=__file__, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_command_leaves_no_output(
    trained: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    (tmp_path / "input").write_text("a film\n" * 6)
    monkeypatch.setattr(prediction, "TEXTS_AT_A_TIME", 2)
    original, names = Predictor.predictions, list[set[str]]()

    def predictions(*args: Any) -> Any:
        names.append({path.name for path in tmp_path.iterdir()})
        if len(names) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(Predictor, "predictions", predictions)
    command = arguments(trained, "sst", input=tmp_path / "input", output=tmp_path / "out")
    assert multitask_classifier.main(command) == 130
    assert capsys.readouterr().err.endswith("stopped at once\n")
    assert names[1] == {"input", "out.tmp"}  # until it is whole it has another name
    assert {path.name for path in tmp_path.iterdir()} == {"input"}


def test_a_pipe_is_answered_line_by_line_and_a_reader_that_leaves_ends_the_command(trained: Path) -> None:
    command = [sys.executable, str(ROOT / "multitask_classifier.py"), *arguments(trained, "sst", threads=1)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, text=True, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)
    predictor = load(trained, "cpu")
    assert process.stdin and process.stdout and process.stderr
    for text in ("a fine film\n", "dull\n"):
        process.stdin.write(text)
        process.stdin.flush()
        value, probability = process.stdout.readline().split("\t")
        ((expected, p),) = predictor.predict("sst", [text], probabilities=True)
        assert (int(value), f"{float(probability):.4f}") == (expected, f"{p:.4f}")
    process.stdout.close()
    process.stdin.write("a song\n")
    process.stdin.flush()
    assert (process.wait(60), process.stderr.read()) == (128 + signal.SIGPIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line(error_line: Line, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "input").write_text("a film\n")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert error_line(input=tmp_path / "input") == "--output -: No space left on device"
