"""What a phone does with an exported model: token ids in, answers out, by onnxruntime alone, on one thread.

`python onnx_answers.py FILE ...` prints how many bytes of memory these models hold after each has answered once.

Shape letters: S sequences, L places of a sequence, R rows.
"""

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import TokenRows

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
Feed = Mapping[str, np.ndarray]
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # glibc's: what is freed goes back


def open_session(path: Path | str) -> Any:
    """onnxruntime with a graph, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(tokens: "TokenRows", rows: Sequence[int] | np.ndarray) -> Feed:
    """A graph's inputs (S, L) for these rows."""
    sequences: list[tuple[np.ndarray, int]] = []  # token ids, and how many are of type 0
    for row in rows:
        ids, first = tokens.ids[tokens.starts[row] :][: tokens.lengths[row]], int(tokens.firsts[row])
        sequences += [(ids[:first], first), (ids[first:], len(ids))] if tokens.is_split else [(ids, first)]
    place = np.arange(max(len(ids) for ids, _ in sequences))
    padded = np.stack([np.pad(ids, (0, len(place) - len(ids))) for ids, _ in sequences])
    lengths, firsts = (np.array(of)[:, None] for of in ([len(ids) for ids, _ in sequences], [n for _, n in sequences]))
    is_real = place < lengths  # (S, L)
    values = (padded, is_real, is_real & (place >= firsts))
    return {name: value.astype(np.int64) for name, value in zip(INPUTS, values, strict=True)}


def answers(session: Any, task: str, tokens: "TokenRows", batch_size: int = 1) -> np.ndarray:
    """A task's answers for all rows, (R, C) or (R,), in their order; rows of similar length share a batch.

    batch_size: 1 as on a phone: what is in eight bits depends a little on the other rows of a batch.
    """
    order = np.argsort(tokens.lengths, kind="stable")
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found = np.concatenate([session.run([task], feed(tokens, part))[0] for part in parts])
    return found[np.argsort(order, kind="stable")]


def example(length: int, num_sequences: int = 1) -> Feed:
    """A row of so many tokens in each of its sequences, always the same."""
    ids = np.ones((num_sequences, length), np.int64)  # (S, L)
    values = (ids, np.ones_like(ids), np.zeros_like(ids))
    return dict(zip(INPUTS, values, strict=True))


def seconds(session: Any, given: Feed) -> float:
    """How long all answers to it take."""
    started = time.perf_counter()
    session.run(None, given)
    return time.perf_counter() - started


def own_memory() -> int:
    """Bytes of memory that this process alone holds, without code that it maps."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def warm_up(folder: Path) -> None:
    """Opens and runs a graph of nothing: what onnxruntime itself takes is not a model's."""
    from onnx import TensorProto, helper, save

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "warm_up", [x], [y])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "warm_up.onnx")
    open_session(folder / "warm_up.onnx").run(None, {"x": np.ones(1, np.float32)})


def main(paths: Sequence[str]) -> None:
    """Opens all the models, each answers one row of 128 tokens, or of two sequences of 64."""
    with tempfile.TemporaryDirectory() as place:
        warm_up(Path(place))
    before, sessions = own_memory(), [open_session(path) for path in paths]
    for session in sessions:
        session.run(None, example(64, 2))
    print(own_memory() - before)


if __name__ == "__main__":
    main(sys.argv[1:])
