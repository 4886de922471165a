"""A model as an ONNX graph: as it is, and smaller.

The graph is that of the program's own modules on padded rows (ops.Padded), so that heads, adapters and poolings need no
second form. Made smaller, the matrices of its layers are in int8 with a scale for each column and meet inputs that
onnxruntime brings to eight bits as they come; tables of embeddings are in int8 or in four bits, looked up and
multiplied out by ONNX's own operations, which other runtimes have too.

Shape letters: S sequences, L places of a sequence, R rows, N numbers of a table's row.
"""

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datasets import Batch
from heads import Reads
from model import MultitaskBert
from onnx_answers import INPUTS
from ops import PackedTokens, Padded
from tasks import TASKS, Output

OPSET = 20  # with GELU and LayerNorm as operations
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the largest number of a block, which may become the largest whole number
BLOCK = 64  # numbers of a table's row that share a scale in four bits
SMALL_TABLE, LARGE_TABLE = 1 << 14, 1 << 20  # a table of fewer numbers stays as it is; of fewer is never in four bits

# -------------------------------------------------------------------------------------------------------- the graph


def answer(output: Output, logits: Tensor) -> Tensor:
    """What a user wants of logits (R, K): the probability of each class (R, C), that of yes (R,), or the score (R,)."""
    probabilities = output.probabilities(logits)
    if probabilities is None:
        return output.decode(logits)
    return probabilities[:, 1] if output.num_outputs == 1 else probabilities


def decoded(output: Output, answers: np.ndarray) -> np.ndarray:
    """(R,) the predictions, in the units of the label, that answers stand for."""
    if output.num_classes is None:
        return answers
    return answers.argmax(1) if answers.ndim == 2 else (answers > 0.5).astype(int)


class PaddedModel(nn.Module):
    """The model on padded sequences: each task's answers. Where a pair is two sequences, they are neighbours."""

    def __init__(self, model: MultitaskBert) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        """Three of (S, L) -> of each task (S, C) or (S,), or half as many where two sequences are a row."""
        model, layout = self.model, self.model.layout
        logits = []
        if model.shares_passes:
            logits = model.logits_of(layout.tasks, _batch(input_ids, attention_mask, token_type_ids, 1))
        for task in layout.tasks[len(logits) :]:
            part = 2 if layout.is_split(task) else 1
            ids, mask, types = input_ids, attention_mask, token_type_ids
            if part == 2:  # one sequence alone: an LSTM reads it twice, as onnxruntime aborts at one over no row
                num_sequences, extra = ids.shape[0], int(Reads.LAST in layout.reads(task))
                chosen = torch.arange((num_sequences + extra) // 2 * 2).clamp(max=num_sequences - 1)
                ids, mask, types = ids[chosen], mask[chosen], types[chosen]
            logits.append(model(task, _batch(ids, mask, types, part)))
        return tuple(answer(TASKS[task].output, of) for task, of in zip(layout.tasks, logits, strict=True))


def _batch(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, part: int) -> Batch:
    """Rows of `part` padded sequences each, three of (S, L)."""
    num_sequences, length = input_ids.shape
    place = torch.arange(length).expand(num_sequences, length).flatten()  # (S L,)
    first_tokens = torch.arange(num_sequences) * length  # (S,)
    ids, types, packing = input_ids.flatten(), token_type_ids.flatten(), Padded(attention_mask.bool())
    return Batch(torch.zeros(num_sequences // part), PackedTokens(ids, types, place, place, first_tokens, packing))


def write_graph(model: MultitaskBert, path: Path) -> None:
    """Writes model.onnx in float32, whose inputs are INPUTS and whose outputs are the tasks."""
    from onnxscript.optimizer import optimize

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    examples = tuple(torch.ones(4, 6, dtype=torch.int64) for _ in INPUTS)  # one tensor would become one input
    longest = model.encoder.config.num_positions
    shape = {0: torch.export.Dim("sequences"), 1: torch.export.Dim("places", max=longest)}
    with _quiet():
        program = torch.onnx.export(
            PaddedModel(model).eval(),
            examples,
            input_names=INPUTS,
            output_names=model.layout.tasks,
            opset_version=OPSET,
            dynamic_shapes=(shape, shape, shape),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        any_size = 1 << 62  # parts of matrices become matrices
        program.model = optimize(program.model, input_size_limit=any_size, output_size_limit=any_size)
        program.save(path, external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors alone: the exporter and the quantizer warn of what they then do themselves."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# ------------------------------------------------------------------------------------------------------ smaller forms


def layers_of(path: Path) -> dict[str, list[str]]:
    """Of each part of the model with matrices of its own, such as `encoder.layers.0.output`, their names in a graph."""
    import onnx

    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    layers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in constants.intersection(node.input if node.op_type in ("Gemm", "MatMul") else ()):
            layers.setdefault(name.removeprefix("model.").rpartition(".")[0] or name, []).append(name)
    return layers


def one_task(source: Path, target: Path, task: str) -> Path:
    """Writes what of a graph one task needs."""
    from onnx.utils import extract_model

    extract_model(source, target, list(INPUTS), [task])
    return target


def write_smaller(source: Path, target: Path, table_bits: int, in_float: Collection[str] = ()) -> None:
    """Writes a graph with the matrices of its layers in int8, and its tables in 8 or in 4 bits.

    in_float: names of matrices that stay floats, of 16 bits in the file.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = [node.name for node in onnx.load(source).graph.node if set(node.input) & set(in_float)]
    nodes += [f"{name}_MatMul" for name in nodes]  # as the quantizer calls what was a Gemm
    with _quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=nodes,
            per_channel=True,
            weight_type=QuantType.QUInt8,  # without VNNI a processor adds up products with signed ones in too few bits
            extra_options={"MatMulConstBOnly": True},
        )
    small = onnx.load(target)
    store_in_16_bits(small.graph)
    pack_tables(small.graph, table_bits)
    onnx.save(small, target)


def store_in_16_bits(graph: Any) -> None:
    """Halves the matrices that products still read in float; whoever opens the graph makes them float32 again."""
    from onnx import TensorProto, helper, numpy_helper

    read = {node.input[1] for node in graph.node if node.op_type in ("Gemm", "MatMul")}
    for tensor in [of for of in graph.initializer if of.name in read and of.data_type == TensorProto.FLOAT]:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(half, f"{tensor.name}.half"))
        cast = helper.make_node("Cast", [f"{tensor.name}.half"], [tensor.name], to=TensorProto.FLOAT)
        graph.node.insert(0, cast)


def quantized_blocks(table: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers (V, N) and scales (V, N / block, 1).

    The largest number of a block becomes 127, or in 4 bits 7 and more that are cut off: of some scales the one whose
    squared errors are least.
    """
    blocks, last = table.reshape(len(table), -1, block), 2 ** (bits - 1) - 1  # (V, N) -> (V, N / block, block)
    largest = np.maximum(np.abs(blocks).max(-1, keepdims=True) / last, np.finfo(np.float32).tiny)
    shares = (1.0,) if bits == 8 else SHARES

    def whole(scales: np.ndarray) -> np.ndarray:
        rounded: np.ndarray = np.rint(blocks / scales).clip(-last, last)
        return rounded

    errors = [np.square(whole(largest * share) * largest * share - blocks).sum(-1, keepdims=True) for share in shares]
    scales = largest * np.array(shares, np.float32)[np.argmin(errors, 0)]
    return whole(scales).astype(np.int8).reshape(table.shape), scales.astype(np.float32)


def pack_tables(graph: Any, bits: int) -> None:
    """Replaces each lookup in a large table of floats by lookups in a table of whole numbers and in one of scales.

    In 8 bits a row has one scale. In 4 bits, for the largest tables only, every BLOCK numbers have one, and a byte
    holds the numbers n and n + N / 2 of a row.
    """
    from onnx import numpy_helper

    looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    is_packed_of = dict[str, bool]()
    for tensor in [of for of in graph.initializer if of.name in looked_up]:
        if len(tensor.dims) != 2 or np.prod(tensor.dims) < SMALL_TABLE:
            continue
        table = numpy_helper.to_array(tensor)
        is_packed = bits == 4 and table.size >= LARGE_TABLE and table.shape[1] % 2 == 0
        is_packed_of[tensor.name] = is_packed
        block = BLOCK if is_packed and table.shape[1] % BLOCK == 0 else table.shape[1]
        whole, scales = quantized_blocks(table, 4 if is_packed else 8, block)
        constants = {
            "scales": scales,
            "whole": whole,
            "blocks": [0, *scales.shape[1:2], block],
            "row": [0, table.shape[1]],
        }
        if is_packed:
            low, high = np.split((whole + 8).astype(np.uint8), 2, axis=1)  # (V, N / 2) each
            constants |= {"whole": low | high << 4, "mask": np.uint8(15), "shift": np.uint8(4), "middle": np.float32(8)}
        graph.initializer.remove(tensor)
        for name, value in constants.items():
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{tensor.name}.{name}"))
    nodes = list(graph.node)
    graph.ClearField("node")
    for node in nodes:
        is_lookup = node.op_type == "Gather" and node.input[0] in is_packed_of
        graph.node.extend(_lookup(node, is_packed_of[node.input[0]]) if is_lookup else [node])


def _lookup(node: Any, is_packed: bool) -> Iterator[Any]:
    """The nodes that look up the rows (T, N) of ids (T,) in place of one whose table has become constants."""
    from onnx import TensorProto, helper

    (table, ids), (output,) = node.input, node.output
    unpacked = [
        ("BitwiseAnd", "rows mask", "low", {}),
        ("BitShift", "rows shift", "high", {"direction": "RIGHT"}),
        ("Concat", "low high", "unpacked", {"axis": 1}),  # (T, N / 2) -> (T, N)
        ("Cast", "unpacked", "unsigned", {"to": TensorProto.FLOAT}),
        ("Sub", "unsigned middle", "floats", {}),
    ]
    nodes: list[tuple[str, str, str, dict[str, Any]]] = [
        ("Gather", "whole ids", "rows", {}),
        *(unpacked if is_packed else [("Cast", "rows", "floats", {"to": TensorProto.FLOAT})]),
        ("Reshape", "floats blocks", "in_blocks", {}),  # (T, N) -> (T, N / block, block)
        ("Gather", "scales ids", "scales_of_rows", {}),  # (T, N / block, 1)
        ("Mul", "in_blocks scales_of_rows", "multiplied", {}),
        ("Reshape", "multiplied row", "output", {}),
    ]
    names = {"ids": ids} | {name: f"{output}.{name}" for _, _, name, _ in nodes} | {"output": output}
    for kind, inputs, name, attributes in nodes:
        given = [names.get(of, f"{table}.{of}") for of in inputs.split()]
        yield helper.make_node(kind, given, [names[name]], **attributes)
