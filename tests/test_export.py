"""Exports: the graph gives the program's answers, its smaller forms come close, and nothing is left half-written."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from huggingface_hub import ModelCard

import multitask_classifier
from bert import BertConfig, empty_bert, initialize
from checkpoints import save_checkpoint
from datasets import TokenizedRows, Tokenizer, TokenRows
from evaluation import Precision, predict_logits
from heads import LstmHead, MlpHead, RoutingHead
from helpers import (
    LINEAR,
    ROOT,
    SPECIALS,
    STD,
    WORDS,
    Capture,
    Patch,
    generator,
    shaken,
    tiny_config,
    tiny_model,
    write_vocabulary,
)
from model import Layout, MultitaskBert
from modernbert import ModernBertConfig
from ops import Packing, Padded, attention, first_token_attention, row_means
from pal import ProjectedAttention
from parameters import Choice
from predictor import load
from roberta import RobertaConfig
from routing import Routing
from tasks import TASKS

onnx = pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")
pytest.importorskip("onnxscript", reason="requirements-export.txt is not installed")

import onnx_graph  # noqa: E402
import onnx_proof  # noqa: E402
from onnx_answers import FREED_AT_ONCE, answers, feed, open_session  # noqa: E402
from onnx_graph import (  # noqa: E402
    SHARES,
    answer,
    layers_of,
    pack_tables,
    quantized_blocks,
    store_in_16_bits,
    write_graph,
    write_smaller,
)
from onnx_proof import score_of  # noqa: E402
from reports.export_report import export_section, write_card  # noqa: E402
from reports.finished_run import FinishedRun  # noqa: E402
from vocabulary import kept_pieces, without_others  # noqa: E402

MLP = Choice("mlp", MlpHead.Parameters(layers=1))
PAL = Choice("pal", ProjectedAttention.Parameters(size=8, heads=2))


def random_rows(task: str, is_split: bool, num_rows: int = 7) -> TokenRows:
    """Rows of different lengths, of one text or of two."""
    draw = np.random.default_rng(3)
    firsts = draw.integers(2, 9, num_rows)
    seconds = draw.integers(2, 9, num_rows) if len(TASKS[task].text_columns) == 2 else np.zeros(num_rows, int)
    lengths = firsts + seconds
    return TokenRows(draw.integers(5, 100, lengths.sum()), lengths, firsts, is_split)


LSTM, ROUTING = Choice("lstm", LstmHead.Parameters(size=8)), Choice("routing", RoutingHead.Parameters(capsules=4))
SIZES: dict[str, Any] = {name: getattr(tiny_config(), name) for name in ("vocab_size", "hidden_size")}
SIZES |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 66}
BERT = tiny_config()
ROBERTA = RobertaConfig(**SIZES, num_hidden_layers=1, pad_token_id=1)
MODERN = ModernBertConfig(**SIZES, num_hidden_layers=2, global_attn_every_n_layers=2, local_attention=6)
MODELS: dict[str, tuple[BertConfig, Layout]] = {
    "shared pass": (BERT, Layout(dict.fromkeys(TASKS, LINEAR), None, 0, "pooler", "cross")),
    "adapters, own layers, routing": (BERT, Layout({"sst": MLP, "sts": ROUTING}, PAL, 1, "mean", "cross")),
    "RoBERTa, siamese, LSTM": (ROBERTA, Layout({"sst": LINEAR, "para": LSTM, "sts": MLP}, PAL, 0, "cls", "siamese")),
    "ModernBERT": (MODERN, Layout(dict.fromkeys(TASKS, LINEAR), None, 0, "mean", "cross")),
}


GraphOf = Callable[[str], tuple[MultitaskBert, Path]]


@pytest.fixture(scope="session")
def graph_of(tmp_path_factory: pytest.TempPathFactory) -> GraphOf:
    """A model and its graph, made once a process: torch.export takes an LSTM's lengths for constants the next time."""

    @cache
    def made(name: str) -> tuple[MultitaskBert, Path]:
        config, layout = MODELS[name]
        encoder = empty_bert(config)
        initialize(encoder, STD, generator(0))
        model = MultitaskBert(encoder, layout, generator(2))
        initialize(model.heads, STD, generator(3))
        shaken(model)
        for parameter in model.heads["sts"].parameters() if "sts" in layout.heads else ():
            parameter.data += 2.5 * (parameter.shape == (1,))  # its bias: not all scores are at an end of the scale
        for routing in (of for of in model.modules() if isinstance(of, Routing)):
            routing.score_bias.data -= 200  # sigmoids are 0 in float32, their logarithms are not
        path = tmp_path_factory.mktemp("graph") / "model.onnx"
        write_graph(model, path)
        return model, path

    return made


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_smaller_graph_gives_the_answers_of_its_rounded_numbers(
    name: str, bits: int, graph_of: GraphOf, tmp_path: Path, monkeypatch: Patch
) -> None:
    """All tables count as large and all layers stay in float; beside it the graph with its numbers replaced."""
    monkeypatch.setattr(onnx_graph, "SMALL_TABLE", 0)
    monkeypatch.setattr(onnx_graph, "LARGE_TABLE", 0)
    (model, whole), smaller, rounded = graph_of(name), tmp_path / "smaller.onnx", tmp_path / "rounded.onnx"
    write_smaller(whole, smaller, bits, list(chain(*layers_of(whole).values())))
    replaced = onnx.load(whole)
    kinds = {of: node.op_type for node in replaced.graph.node for of in node.input}
    num_tables = 0
    for tensor in replaced.graph.initializer:
        numbers = onnx.numpy_helper.to_array(tensor)
        if kinds[tensor.name] == "Gather" and numbers.ndim == 2:
            integers, scales = quantized_blocks(numbers, bits, numbers.shape[1])
            tensor.CopyFrom(onnx.numpy_helper.from_array((integers * scales[:, 0]).astype(np.float32), tensor.name))
            num_tables += 1
        elif kinds[tensor.name] in ("Gemm", "MatMul") and numbers.ndim == 2:
            half = numbers.astype(np.float16).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    onnx.save(replaced, rounded)
    assert num_tables == len([of for of in model.encoder.modules() if isinstance(of, torch.nn.Embedding)])
    for task in model.layout.tasks:
        tokens = random_rows(task, model.layout.is_split(task))
        for batch_size in (1, 3):
            found, expected, before = (
                answers(open_session(path), task, tokens, batch_size) for path in (smaller, rounded, whole)
            )
            np.testing.assert_allclose(found, expected, atol=1e-4)
            assert np.abs(found - before).max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_gives_the_programs_answers(name: str, graph_of: GraphOf) -> None:
    model, path = graph_of(name)
    layout, session = model.layout, open_session(path)
    for task in layout.tasks:
        tokens = random_rows(task, model.layout.is_split(task))
        rows = TokenizedRows(TASKS[task], [""] * 7, np.zeros(7, np.float32), tokens, torch.device("cpu"))
        logits = predict_logits(model, task, rows, 4, Precision(torch.device("cpu")))
        expected = answer(TASKS[task].output, logits).numpy()
        assert logits.std(0).max() > 1e-3
        for batch_size in (1, 3):
            np.testing.assert_allclose(answers(session, task, tokens, batch_size), expected, atol=1e-4)


def test_padded_rows_give_what_packed_rows_give() -> None:
    lengths, draw = [3, 5, 1], torch.Generator().manual_seed(0)
    is_real = torch.arange(5) < torch.tensor(lengths)[:, None]
    qkv = torch.randn(15, 24, generator=draw)
    padded, packed, real = Padded(is_real), Packing.of(lengths), is_real.flatten()
    context = attention(qkv[real], packed, 2, 0.0, None)
    torch.testing.assert_close(attention(qkv, padded, 2, 0.0, None)[real], context)
    firsts = first_token_attention(qkv[[0, 5, 10], :8], qkv[:, 8:], padded, 2, 0.0, None)
    torch.testing.assert_close(firsts, context[[0, 3, 8]])
    torch.testing.assert_close(row_means(qkv, padded), row_means(qkv[real], packed))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_table_gives_its_rows_multiplied_out(bits: int, tmp_path: Path, monkeypatch: Patch) -> None:
    from onnx import TensorProto, helper, numpy_helper

    monkeypatch.setattr("onnx_graph.LARGE_TABLE", 0)
    table = np.random.default_rng(0).normal(size=(200, 128)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", ids], [rows]) for ids, rows in (("ids", "rows"), ("others", "more"))],
        "lookup",
        [helper.make_tensor_value_info(ids, TensorProto.INT64, ["n"]) for ids in ("ids", "others")],
        [helper.make_tensor_value_info(rows, TensorProto.FLOAT, ["n", 128]) for rows in ("rows", "more")],
        [numpy_helper.from_array(table, "table")],
    )
    pack_tables(graph, bits)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(made, tmp_path / "lookup.onnx")
    ids, others = np.array([0, 199, 7, 7]), np.array([1, 2, 0, 198])
    found, more = open_session(tmp_path / "lookup.onnx").run(None, {"ids": ids, "others": others})
    block = {8: 128, 4: 64}[bits]
    whole, scales = quantized_blocks(table, bits, block)
    expected = (whole.reshape(200, -1, block) * scales).reshape(200, 128)
    np.testing.assert_allclose(found, expected[ids], rtol=1e-6)
    np.testing.assert_allclose(more, expected[others], rtol=1e-6)
    assert np.abs(found - table[ids]).mean() < np.abs(table).max() / {8: 127, 4: 7}[bits] / 2
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) < table.nbytes * (bits + 1.3) / 32


def test_a_matrix_that_stays_in_float_is_stored_in_16_bits(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    matrix, rows = (draw.normal(size=size).astype(np.float32) for size in ((64, 32), (5, 64)))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["rows", "matrix"], ["found"])],
        "product",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("found", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(matrix, "matrix")],
    )
    store_in_16_bits(graph)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(made, tmp_path / "product.onnx")
    found = open_session(tmp_path / "product.onnx").run(None, {"rows": rows})[0]
    np.testing.assert_allclose(found, rows @ matrix.astype(np.float16).astype(np.float32), rtol=1e-4, atol=1e-4)
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) == matrix.nbytes / 2


def test_in_eight_bits_the_largest_number_of_a_block_becomes_the_largest_whole_number() -> None:
    whole, scales = quantized_blocks(np.array([[1.0, -4.0, 0.0, 0.0]], np.float32), 8, 2)
    assert whole.tolist() == [[32, -127, 0, 0]] and scales.ravel().tolist() == pytest.approx([4 / 127, 0.0])


def test_in_four_bits_no_other_scale_of_those_tried_gives_smaller_errors() -> None:
    table = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    whole, scales = quantized_blocks(table, 4, 16)
    errors = np.square(whole.reshape(50, 4, 16) * scales - table.reshape(50, 4, 16)).sum(-1)
    for share in SHARES:
        step = share * np.abs(table.reshape(50, 4, 16)).max(-1, keepdims=True) / 7
        naive = np.clip(np.round(table.reshape(50, 4, 16) / step), -7, 7) * step
        assert (errors <= np.square(naive - table.reshape(50, 4, 16)).sum(-1) * 1.0001).all()
    assert abs(whole).max() == 7 and errors.sum() < 0.9 * np.square(naive - table.reshape(50, 4, 16)).sum()


def test_sequences_of_a_split_row_are_neighbours() -> None:
    given = feed(TokenRows(np.array([2, 9, 3, 2, 8, 8, 3]), np.array([7]), np.array([3]), True), [0])
    assert given["input_ids"].tolist() == [[2, 9, 3, 0], [2, 8, 8, 3]]
    assert given["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]] and not given["token_type_ids"].any()


def found(loss: float) -> dict[str, Any]:
    """Scores of a form: by the metric that counts SST alone loses, and by the others STS too."""
    return {
        "dev": {"sts": {"pearson": 0.8, "spearman": 0.8 - 9 * loss}, "sst": {"accuracy": 0.9 - loss, "macro_f1": 0.3}}
    }


def fake_forms(monkeypatch: Patch, losses: dict[str, float]) -> None:
    """Forms whose SST accuracy is 0.9 less the loss of each layer that is not in float."""
    layers: list[str] = []
    monkeypatch.setattr("onnx_proof.layers_of", lambda path: {layer: [f"{layer}.weight"] for layer in losses})

    def write(source: Path, target: Path, bits: int, in_float: list[str]) -> None:
        layers[:] = [layer for layer in losses if f"{layer}.weight" not in in_float]

    monkeypatch.setattr("onnx_proof.write_smaller", write)
    monkeypatch.setattr("onnx_proof._by_movement", lambda *given: sorted(losses, key=lambda layer: -losses[layer]))
    monkeypatch.setattr("onnx_proof.prove", lambda *given: found(sum(losses[layer] for layer in layers)))


def written_within(max_loss: float, told: list[str]) -> dict[str, Any]:
    return onnx_proof.write_within(max_loss, Path("a"), Path("small.onnx"), 8, found(0.0), {}, {}, told.append)


def test_the_costliest_layers_stay_in_float_until_the_loss_is_small_enough(monkeypatch: Patch) -> None:
    fake_forms(monkeypatch, {"a": 0.002, "b": 0.02, "c": 0.001, "d": 0.01})
    told: list[str] = []
    best = written_within(0.005, told)
    assert best["in_float"] == ["b", "d"] and best["largest_loss"] == pytest.approx(0.003)
    assert told == [
        "small.onnx: a task loses 0.03300, 0.005 may be lost: which layers need floats?",
        "small.onnx: b stays in float: largest loss 0.01300",
        "small.onnx: d stays in float: largest loss 0.00300",
    ]
    assert written_within(0.05, told)["in_float"] == [] and len(told) == 3


def test_answers_that_are_not_finite_are_refused(
    treated_run: Path, exported: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr("export.write_graph", lambda model, path: shutil.copyfile(exported / "model.onnx", path))
    monkeypatch.setattr("onnx_proof.answers", lambda session, task, tokens, size: np.full(len(tokens), np.nan))
    flags = f"--option export --checkpoint {treated_run} --out {tmp_path / 'out'}"
    assert multitask_classifier.main(flags.split()) == 2
    line = r"error: model\.onnx: its answers to (\d+) of \1 dev rows of sst are not finite\n"
    assert re.fullmatch(line, capsys.readouterr().err) and list(tmp_path.iterdir()) == []


def test_two_rows_of_four_hundred_are_a_loss_of_five_thousandths(monkeypatch: Patch) -> None:
    assert 0.9 - (0.9 - 0.005) > 0.005
    fake_forms(monkeypatch, {"a": 0.005})
    assert written_within(0.005, [])["in_float"] == []


def test_a_loss_that_no_layer_mends_is_refused(monkeypatch: Patch) -> None:
    fake_forms(monkeypatch, {"a": 0.0, "b": 0.0, "c": 0.02})
    assert written_within(0.001, [])["in_float"] == ["c"]
    fake_forms(monkeypatch, dict.fromkeys("abcdefgh", 0.01))
    proofs = iter([found(0.08), found(0.03)])  # no layer is tried where all of them together are not enough
    monkeypatch.setattr("onnx_proof.prove", lambda *given: next(proofs))
    with pytest.raises(onnx_proof.ProofError, match=r"loses 0\.0300 of its dev score, also with all layers in float"):
        written_within(0.005, [])


def test_layers_are_ranked_by_how_far_each_alone_moves_the_answers(monkeypatch: Patch) -> None:
    moves, small = {"a": 0.1, "b": -0.3, "c": 0.2}, list[str]()

    class Session:
        def run(self, names: list[str], given: Any) -> list[np.ndarray]:
            return [np.full(1, 2.0 + moves[small[0]])]

    def write(source: Path, target: Path, bits: int, in_float: list[str]) -> None:
        small[:] = [layer for layer in moves if f"{layer}.weight" not in in_float]
        assert len(small) == 1

    monkeypatch.setattr("onnx_proof.write_smaller", write)
    monkeypatch.setattr("onnx_proof.open_session", lambda path: Session())
    layers = {layer: [f"{layer}.weight"] for layer in moves}
    rows = TokenizedRows(
        TASKS["sts"], [""] * 7, np.zeros(7, np.float32), random_rows("sts", False), torch.device("cpu")
    )
    given = Path("a"), Path("b"), layers, {"sts": np.full(7, 2.0)}, {"sts": rows}
    assert onnx_proof._by_movement(*given) == ["b", "c", "a"]


def test_a_form_is_compared_by_its_own_answers() -> None:
    """Of four rows each: one class changes from right to wrong, one answer of yes and no, and one score."""
    classes, scores = np.eye(5), np.arange(4.0)
    program = {"sst": classes[[0, 1, 2, 2]], "para": np.array([0.9, 0.2, 0.6, 0.1]), "sts": scores}
    form = {"sst": classes[[0, 1, 2, 4]], "para": np.array([0.8, 0.2, 0.4, 0.1]), "sts": scores[[0, 1, 3, 2]]}
    labels = {"sst": [0, 1, 2, 2], "para": [1, 0, 1, 0], "sts": [0, 1, 2, 3]}
    dev: Any = {task: SimpleNamespace(labels=np.array(of, np.float32)) for task, of in labels.items()}
    whole, smaller = onnx_proof.compare(program, program, dev), onnx_proof.compare(form, program, dev)
    assert [score_of(whole, task) for task in (*labels, "mean")] == pytest.approx([1.0] * 4)
    assert [score_of(smaller, task) for task in (*labels, "mean")] == pytest.approx([0.75, 0.75, 0.8, 2.3 / 3])
    assert whole["changed_classes"] == {"sst": 0, "para": 0} and smaller["changed_classes"] == {"sst": 1, "para": 1}
    assert set(whole["largest_difference"].values()) == {0.0}
    assert smaller["largest_difference"] == pytest.approx({"sst": 1.0, "para": 0.2, "sts": 1.0})
    lost = onnx_proof.losses(smaller, whole)
    assert lost == pytest.approx({"sst": 0.25, "para": 0.25, "sts": 0.2})


def test_times_are_of_each_length_in_turns_without_the_first(monkeypatch: Patch) -> None:
    """The program takes 10 ms and a file 2 ms, in their first turns a second, and once 90 ms and 40 ms."""
    seconds = [1.0, 1.0] * 3 + [0.01, 0.002] * 59 + [0.09, 0.04]
    monkeypatch.setattr("onnx_proof.open_session", lambda path: SimpleNamespace(run=print))
    monkeypatch.setattr("onnx_proof._eager", lambda *given: None)
    left = iter(seconds * 2)  # of two lengths
    monkeypatch.setattr("onnx_proof._seconds", lambda way: next(left))
    predictor: Any = SimpleNamespace(model=tiny_model())
    found = onnx_proof.measure_times(predictor, [Path("model.onnx")])
    assert list(found) == ["program", "model.onnx"] and all(list(of) == ["16", "32"] for of in found.values())
    for name, median, slow in (("program", 10, 42.8), ("model.onnx", 2, 17.58)):
        for of_length in found[name].values():
            assert of_length == pytest.approx({"median": median, "p99": slow}, rel=0.01)


def test_a_table_shows_each_number_in_its_column() -> None:
    dev = {"sst": {"accuracy": 0.5, "macro_f1": 0.1}, "sts": {"pearson": 0.75, "spearman": 0.2}, "mean": 0.625}
    whole = {"dev": dev, "largest_difference": {"sst": 0.0, "sts": 0.0}, "changed_classes": {"sst": 0}}
    form = {
        **whole,
        "largest_difference": {"sst": 0.25, "sts": 0.5},
        "changed_classes": {"sst": 3},
        "in_float": ["a", "b"],
    }
    form |= {"bytes": 2_000_000, "memory": 3_000_000, "separate": {"bytes": 4_000_000, "memory": 12_000_000}}
    form["milliseconds"] = {n: {"median": int(n) / 10, "p99": int(n) / 5} for n in ("16", "32")}
    scores, times, sizes = export_section({"program": whole, "small": form}).blocks
    assert scores.columns[1:5] == ["MB", "sst", "sts", "mean"]
    assert scores.rows[0] == ["program", "-", "0.5000", "0.7500", "0.6250", "0", "0", "-"]
    assert scores.rows[1] == ["small", "2.0", "0.5000", "0.7500", "0.6250", "5.0e-01 (sts)", "3", "a, b"]
    assert times.rows == [["small", "1.6", "3.2", "3.2", "6.4"]]
    assert sizes.rows == [["small", "2.0", "4.0", "0.50", "3.0", "12.0", "0.25"]]


def test_a_smaller_vocabulary_has_the_pieces_of_the_texts_and_spells_all_other_words(tmp_path: Path) -> None:
    letters = ["b", "z", "é", "##a", "##b", "##z", "北", "##北"]
    folder = write_vocabulary(tmp_path, [*WORDS, *letters])
    whole = Tokenizer(folder, 32)
    whole.save(folder / "tokenizer.json")
    texts = [("a fine film",), ("the plot",)]
    kept = kept_pieces(folder, [whole.encode(texts).ids])
    model = tiny_model(vocab_size=whole.vocab_size)
    smaller, rest = without_others(model, folder, kept), Tokenizer(folder, 32)
    weights = [of.encoder.word_embeddings.weight for of in (model, smaller)]
    ids = [of.encode(texts).ids for of in (whole, rest)]
    assert ids[0].tolist() != ids[1].tolist() and torch.equal(weights[0][ids[0]], weights[1][ids[1]])
    pieces = (folder / "vocab.txt").read_text("utf-8").split()
    words = [word for word in WORDS if word in ["a", "fine", "film", "the", "plot"] or len(word) == 1]
    assert pieces == [*SPECIALS, *words, *letters[:-2]]
    spelled = rest.encode([("zab 北",)]).ids.tolist()
    assert [pieces[place] for place in spelled] == ["[CLS]", "z", "##a", "##b", "[UNK]", "[SEP]"]


@pytest.mark.parametrize("kind", ["none", "template", "bert"])
def test_special_tokens_get_their_new_ids_wherever_the_tokenizer_names_them(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import processors

    folder = write_vocabulary(tmp_path)
    (folder / "vocab.txt").write_text("\n".join([*WORDS[:9], *SPECIALS, *WORDS[9:]]) + "\n")
    Tokenizer(folder, 32).save(folder / "tokenizer.json")
    fast = Fast.from_file(str(folder / "tokenizer.json"))
    ids = {name: fast.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    if kind == "template":
        forms = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
        fast.post_processor = processors.TemplateProcessing(*forms, list(ids.items()))
    elif kind == "bert":
        fast.post_processor = processors.BertProcessing(*(tuple(pair) for pair in reversed(ids.items())))
    fast.save(str(folder / "tokenizer.json"))
    whole, texts = Tokenizer(folder, 32), [("a fine film",), ("fine a", "film")]
    kept = kept_pieces(folder, [whole.encode(texts[:1]).ids])
    without_others(tiny_model(vocab_size=whole.vocab_size), folder, kept)
    rest = Tokenizer(folder, 32)
    assert rest.special_ids() != whole.special_ids()
    assert {name: kept[place] for name, place in rest.special_ids().items()} == whole.special_ids()
    for row in texts:
        assert kept[rest.encode([row]).ids].tolist() == whole.encode([row]).ids.tolist()
    written = json.loads((folder / "tokenizer.json").read_text())
    assert {token["content"]: token["id"] for token in written["added_tokens"]} == {
        name: written["model"]["vocab"][name] for name in SPECIALS
    }


@pytest.fixture(scope="module")
def exported(treated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of a run, in whose model small tables count as large ones."""
    out = tmp_path_factory.mktemp("exported") / "export"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "SMALL_TABLE", 1)
        patch.setattr(onnx_graph, "LARGE_TABLE", 1)
        flags = f"--option export --checkpoint {treated_run} --out {out} --max_loss 1"  # of eight rows one is much
        assert multitask_classifier.main(flags.split()) == 0
    return out


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """The constants of a graph."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_a_layer_in_float_keeps_its_numbers_and_the_others_have_a_scale_for_each_column(
    exported: Path, tmp_path: Path
) -> None:
    source, target = exported / "model.onnx", tmp_path / "small.onnx"
    in_float, *others = layers_of(source).values()
    write_smaller(source, target, 8, in_float)
    before = tensors_of(source)
    after = {name.replace("_Transposed", ""): value for name, value in tensors_of(target).items()}  # what was a Gemm's
    assert in_float and len(others) > 8
    for name in in_float:
        np.testing.assert_allclose(after[f"{name}.half"].T, before[name], rtol=1e-3, atol=1e-6)
    for name in chain(*others):
        whole, scales, zeros = (after[f"{name}_{part}"] for part in ("quantized", "scale", "zero_point"))
        assert name not in after and whole.dtype == np.uint8 and scales.shape == zeros.shape == whole.shape[1:]
        assert (np.abs((whole.astype(np.float32) - zeros) * scales - before[name].T) <= scales * 0.501).all()


def test_a_vocabulary_of_the_training_texts_serves_the_graph_and_what_stands_beside_it(
    data: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The last word is in dev and test rows alone; special tokens stand behind all words."""
    folder, texts, out = (tmp_path / name for name in ("model", "data", "out"))
    shutil.copytree(data, texts)
    for path in texts.glob("*-train.csv"):
        path.write_text(path.read_text("utf-8").replace(WORDS[-1], WORDS[-2]), "utf-8")
    (write_vocabulary(folder) / "vocab.txt").write_text("\n".join([*WORDS, *SPECIALS]) + "\n")
    model = shaken(tiny_model(vocab_size=len(WORDS) + len(SPECIALS)))
    torch.nn.init.constant_(model.head_parameters("sts")["heads.sts.output.bias"], 2.5)  # no score is cut off
    save_checkpoint(model, folder, folder)
    monkeypatch.setattr("export.SMALLER", {})
    monkeypatch.setattr("export.measure_memory", len)
    monkeypatch.setattr("onnx_proof.TURNS", 1)
    flags = f"--option export --checkpoint {folder} --data {texts} --out {out} --vocabulary data --max_loss 1"
    assert multitask_classifier.main([*flags.split(), "--max_length", "9"]) == 0
    pieces = [*WORDS[:-1], *SPECIALS]
    assert (out / "vocab.txt").read_text().split() == pieces
    labels, cls, sep = json.loads((out / "labels.json").read_text()), pieces.index("[CLS]"), pieces.index("[SEP]")
    assert labels["max_length"] == 9
    assert labels["special_tokens"] == {"1": [[cls], [sep]], "2": [[cls], [sep], [sep]]}
    given = ("a fine film", "the plot")
    for task, row in (("sst", given[:1]), ("sts", given)):
        found = answers(open_session(out / "model.onnx"), task, Tokenizer(out, 9).encode([row]))[0]
        expected = load(folder, "cpu").predict(task, [row if len(row) > 1 else row[0]], probabilities=task == "sst")[0]
        best = (int(found.argmax()), float(found.max())) if task == "sst" else float(found)
        assert best == pytest.approx(expected, abs=1e-4)
    assert len(tensors_of(out / "model.onnx")["model.encoder.word_embeddings.weight"]) == len(pieces)
    found = json.loads((out / "report.json").read_text())["model.onnx"]
    assert found["vocabulary"] == {"kept": len(pieces), "pieces": len(pieces) + 1} and found["max_loss"] == 1


@pytest.mark.parametrize("is_split", [False, True])
def test_who_fills_the_inputs_as_labels_json_explains_it_asks_what_the_program_asks(
    is_split: bool, exported: Path
) -> None:
    labels, pieces = json.loads((exported / "labels.json").read_text()), exported / "tokenizer.json"
    tokenizer, draw = tokenizers.Tokenizer.from_file(str(pieces)), random.Random(0)
    assert {"input_ids", "attention_mask", "token_type_ids", "two_sequences", "max_length"} <= set(labels["explained"])

    def sequence(texts: Sequence[str], limit: int) -> tuple[list[int], list[int]]:
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        first, *behind = labels["special_tokens"][str(len(texts))]
        while len(first) + sum(map(len, [*ids, *behind])) > limit:
            max(reversed(ids), key=len).pop()
        parts = [first + ids[0] + behind[0], *([ids[1] + behind[1]] if len(texts) == 2 else [])]
        return [i for part in parts for i in part], [kind for kind, part in enumerate(parts) for _ in part]

    for _ in range(60):
        row = tuple(" ".join(draw.choices(WORDS, k=draw.randrange(12))) for _ in range(draw.choice([1, 2])))
        filled = [sequence([text], 9) for text in row] if is_split else [sequence(row, 9)]
        length = max(len(ids) for ids, _ in filled)
        wanted = [
            [ids + [0] * (length - len(ids)) for ids, _ in filled],
            [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in filled],
            [kinds + [0] * (length - len(kinds)) for _, kinds in filled],
        ]
        given = feed(Tokenizer(exported, 9, is_split).encode([row]), [0])
        assert [of.tolist() for of in given.values()] == wanted


def test_the_card_of_an_export_has_the_scores_of_its_file_and_what_it_may_lose(
    exported: Path, treated_run: Path, tmp_path: Path
) -> None:
    report = json.loads((exported / "report.json").read_text())
    report["model.onnx"]["dev"]["sst"]["accuracy"], report["model.onnx"]["dev"]["mean"] = 0.123, 0.321
    report["model.onnx"]["vocabulary"] = {"kept": 1200, "pieces": 3000}
    write_card(tmp_path, FinishedRun.read(treated_run), report)
    card = (tmp_path / "model_card.md").read_text()
    results = ModelCard(card).data.eval_results
    assert results is not None and results[0].metric_value == 0.123
    scores, _, files = card.partition("## Exported files")
    assert " 0.321 " in scores and f"{report['program']['dev']['mean']:.3f} " not in scores
    assert "1,200 of 3,000 word pieces" in files and "model.int8.onnx 1, model.small.onnx 2" in files
    assert "dev files, by which the epoch was chosen" in card


@pytest.mark.parametrize("name", ["sample", "elsewhere"])
def test_the_card_of_an_export_that_was_tried_on_other_rows_says_so(
    name: str, exported: Path, treated_run: Path, tmp_path: Path
) -> None:
    run, report = FinishedRun.read(treated_run), json.loads((exported / "report.json").read_text())
    assert {key: of["sha256"] for key, of in report["program"]["data_files"].items()} == run.data_checksums("dev")
    report["program"]["data"] = name
    report["program"]["data_files"]["ids-sst-dev.csv"] = {"rows": 77, "sha256": "0"}
    write_card(tmp_path, run, report)
    card = (tmp_path / "model_card.md").read_text()
    assert "Scores are of other dev files than those by which the epoch was chosen." in card and "sst dev 77" in card
    assert ("the program's own sample" in card) == (name == "sample")


def test_the_command_writes_and_proves_three_files(exported: Path, treated_run: Path) -> None:
    report = json.loads((exported / "report.json").read_text())
    assert list(report) == ["program", "model.onnx", "model.int8.onnx", "model.small.onnx"]
    results = json.loads((treated_run / "results.json").read_text())
    assert report["program"]["dev"]["mean"] == pytest.approx(results["dev"]["mean"])
    assert max(report["model.onnx"]["largest_difference"].values()) < 1e-4
    assert 0 < max(report["model.int8.onnx"]["largest_difference"].values()) < 0.3
    texts = [("a fine film",), ("not good",)]
    ids = [Tokenizer(folder, 64).encode(texts).ids.tolist() for folder in (exported, treated_run / "best")]
    assert ids[0] == ids[1]
    labels = json.loads((exported / "labels.json").read_text())
    assert all(of["classes"] == list(TASKS[task].output.class_names) for task, of in labels["tasks"].items())
    assert {task: of["output"] for task, of in labels["tasks"].items()} == {
        "sst": "probabilities",
        "para": "probability",
        "sts": "score",
    }


def test_a_form_that_is_another_one_is_left_out_and_named(
    exported: Path, treated_run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """No table of a tiny model is large enough for four bits, which makes the smaller form."""
    monkeypatch.setattr("export.write_graph", lambda model, path: shutil.copyfile(exported / "model.onnx", path))
    monkeypatch.setattr("export.measure_memory", len)
    monkeypatch.setattr("onnx_proof.TURNS", 1)
    out = tmp_path / "out"
    flags = f"--option export --checkpoint {treated_run} --out {out} --max_loss 1"
    assert multitask_classifier.main(flags.split()) == 0
    line = "model.small.onnx: the same as model.int8.onnx, no table of it is large enough for 4 bits; it was left out\n"
    assert capsys.readouterr().out.endswith(line)
    assert sorted(path.name for path in out.glob("*.onnx")) == ["model.int8.onnx", "model.onnx"]
    assert list(json.loads((out / "report.json").read_text())) == ["program", "model.onnx", "model.int8.onnx"]


@pytest.mark.parametrize("kind", ["existing", "missing", "full disk", "weights", "results", "tokenizer"])
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    kind: str, treated_run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    out, run, before = tmp_path / "export", tmp_path / "run", ["export.tmp", "run"]
    (tmp_path / "export.tmp").mkdir()  # of someone else
    shutil.copytree(treated_run, run)
    words = {
        "existing": f"--out {out}: exists already, expected a new directory",
        "missing": "--option export: no_such_package not installed: pip install -r requirements-export.txt",
        "full disk": f"--out {out}: cannot be written (No space left on device)",
        "weights": f"{run / 'best' / 'model.safetensors'}: ",
        "results": f"{run / 'results.json'}: ",
        "tokenizer": "--vocabulary data: the tokenizer has no word pieces, expected that of a BERT",
    }

    def full_disk(model: Any, path: Path) -> None:
        path.write_bytes(b"half a graph")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.write_graph", full_disk)
    flags = ""
    if kind == "existing":
        out.mkdir()
        before = ["export", *before]
    elif kind == "missing":
        monkeypatch.setattr("export.PACKAGES", ("onnx", "no_such_package"))
    elif kind == "weights":
        (run / "best" / "model.safetensors").write_bytes(b"no tensors")
    elif kind == "results":
        (run / "results.json").write_text("{")
    elif kind == "tokenizer":
        flags = "--vocabulary data"
        monkeypatch.setattr(Tokenizer, "save", lambda tokenizer, path: path.write_text('{"model": {"type": "BPE"}}'))
    assert multitask_classifier.main(f"--option export --checkpoint {run} --out {out} {flags}".split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words[kind]}") and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before and not list(out.glob("*"))


@pytest.mark.parametrize("named", ["", "best", "last"])
def test_an_export_of_a_runs_checkpoint_is_proved_on_the_runs_data(
    named: str, exported: Path, treated_run: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Its card, with the scores of the best checkpoint, is not the last one's."""
    run = shutil.copytree(treated_run, tmp_path / "run")
    report, seen = json.loads((exported / "report.json").read_text()), list[int]()

    def write_files(folder: Path, config: Any, predictor: Any, texts: Any, say: Any) -> tuple[Any, dict[str, str]]:
        seen.extend(len(rows) for rows in texts["dev"](predictor.tokenizer).values())
        return report, {}

    monkeypatch.setattr("export.write_files", write_files)
    assert multitask_classifier.main(f"--option export --checkpoint {run / named}".split()) == 0
    files = json.loads((run / "config.json").read_text())["data_files"]
    assert seen == [of["rows"] for name, of in files.items() if "dev" in name]
    assert (run / "export" / "report.json").exists()
    assert (run / "export" / "model_card.md").exists() == (named != "last")


def test_an_export_that_is_told_to_stop_leaves_nothing(treated_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    command = [sys.executable, ROOT / "multitask_classifier.py", "--option", "export", "--checkpoint", treated_run]
    with subprocess.Popen([*command, "--out", out], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline().startswith(f"{out}: a file in float32")
        while not list(tmp_path.glob("export.*/export")):
            time.sleep(0.05)
        process.terminate()
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("lost", "kept"), [("int8", "small"), ("small", "int8")])
def test_a_form_that_loses_too_much_is_left_out_and_named(
    lost: str, kept: str, exported: Path, treated_run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """An error if it is the one in eight bits."""
    allowed: dict[str, float] = {}

    def write_within(max_loss: float, source: Path, target: Path, *given: Any) -> dict[str, Any]:
        shutil.copyfile(source, target)
        allowed[target.name] = max_loss
        if target.name == f"model.{lost}.onnx":
            raise onnx_proof.ProofError(f"{target.name}: a task loses more than {max_loss}")
        return dict(json.loads((exported / "report.json").read_text())[target.name])

    monkeypatch.setattr("export.write_graph", lambda model, path: shutil.copyfile(exported / "model.onnx", path))
    monkeypatch.setattr("export.write_within", write_within)
    monkeypatch.setattr("export.measure_memory", len)
    monkeypatch.setattr("onnx_proof.TURNS", 1)
    flags = f"--option export --checkpoint {treated_run} --out {tmp_path / 'out'} --max_loss 0.01"
    status, shown = multitask_classifier.main(flags.split()), capsys.readouterr()
    line = f"model.{lost}.onnx: a task loses more than {0.01 if lost == 'int8' else 0.02}; it was left out\n"
    if lost == "int8":
        assert status == 2 and shown.err == f"error: {line}"
    else:
        assert status == 0 and shown.err == "" and shown.out.endswith(line)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.onnx")) == sorted(
        ["model.onnx", f"model.{kept}.onnx"]
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report) == ["program", "model.onnx", f"model.{kept}.onnx"]
    assert allowed == {"model.int8.onnx": 0.01, "model.small.onnx": 0.02}
    assert [(of["memory"], of["separate"]["memory"]) for of in list(report.values())[1:]] == [(1, 3)] * 2
    whole = report["model.onnx"]
    assert whole["bytes"] < whole["separate"]["bytes"] < 3 * whole["bytes"]  # a model of one task has no other heads


def test_a_vocabulary_that_costs_too_much_is_refused(
    exported: Path, treated_run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr("export.write_graph", lambda model, path: shutil.copyfile(exported / "model.onnx", path))
    monkeypatch.setattr("export.prove", lambda *given: json.loads((exported / "report.json").read_text())["program"])
    monkeypatch.setattr("export.losses", lambda found, whole: {"sst": 0.01, "para": 0.07, "sts": -0.1})
    monkeypatch.setattr("export.kept_pieces", lambda *given: np.arange(10))
    monkeypatch.setattr("export.without_others", lambda model, *given: model)
    flags = f"--option export --checkpoint {treated_run} --out {tmp_path / 'out'} --vocabulary data"
    assert multitask_classifier.main(flags.split()) == 2
    assert capsys.readouterr().err == (
        "error: --vocabulary data: para loses 0.0700 of its dev score, expected at most 0.005 (--max_loss): "
        "too many words of the dev rows are in no training text\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured under Linux")
def test_own_memory_is_what_is_held_and_not_what_was_freed() -> None:
    script = """
from onnx_answers import own_memory
before, blocks = own_memory(), [bytearray(100_000) for _ in range(400)]
held, last = own_memory(), blocks.pop()
del blocks
print(held - before, own_memory() - before)
"""
    environment = {**os.environ, **FREED_AT_ONCE, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    held, left = map(int, done.stdout.split())
    assert 39e6 < held < 44e6 and 0 < left < 2e6
