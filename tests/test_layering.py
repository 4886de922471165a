"""The import graph of the program, line by line and floor by floor, and what importing it does: nothing."""

import ast
import io
import tokenize
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from test_encoders import write_tokenizer

from helpers import ROOT, cases, run_python

NUM_FLOORS = 9

HEAVY = ("transformers", "sentence_transformers", "sklearn", "scipy", "matplotlib", "nltk", "tensorboard")
ASIDE = ("reports", "benchmarks", "demo", "sweeps", "tests")  # what nothing of the core imports


def listed() -> dict[str, set[str]]:
    """Of each module those that it imports, by cases/imports.txt."""
    result: dict[str, set[str]] = {}
    for line in cases("imports.txt"):
        name, _, imports = line.partition(":")
        result.setdefault(name, set()).update(imports.split())
    return result


LISTED = listed()
CORE = [name for name in LISTED if not name.startswith("reports")]


def path_of(name: str) -> Path:
    path = ROOT / Path(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported aside) of all imports in a file, importlib's with a literal name included.

    Aside: inside a function or in the branch that runs the file as a command.
    """

    def visit(node: ast.AST, aside: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, aside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in LISTED else str(node.module), aside
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((str(arg.value), aside) for arg in node.args if isinstance(arg, ast.Constant))
        is_command = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, aside or is_command or isinstance(node, ast.FunctionDef))

    return visit(ast.parse(path.read_text("utf-8")), False)


def longest_chain(graph: Mapping[str, set[str]]) -> int:
    """Floors of a graph without circles. Raises CycleError for one with a circle."""
    floors: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        floors[name] = 1 + max((floors[lower] for lower in graph.get(name, ())), default=0)
    return max(floors.values())


def test_every_module_of_the_program_is_in_the_list() -> None:
    paths = [path for pattern in ("*.py", "ops/*.py", "reports/*.py") for path in ROOT.glob(pattern)]
    assert sorted(paths) == sorted(map(path_of, LISTED))


@pytest.mark.parametrize("name", LISTED)
def test_a_module_imports_exactly_what_the_list_says(name: str) -> None:
    found = set()
    for module, is_aside in imported(path_of(name)):
        first = module.split(".")[0]
        if module in LISTED or first in {*LISTED, *ASIDE}:
            found.add(f"({module})" if is_aside and first in ASIDE and name in CORE else module)
    assert found == LISTED[name], f"more {sorted(found - LISTED[name])}, not there {sorted(LISTED[name] - found)}"


def test_nothing_of_the_core_imports_what_stands_beside_it_and_there_is_no_circle_and_few_floors() -> None:
    aside = {(name, module) for name in CORE for module in LISTED[name] if module.strip("()").split(".")[0] in ASIDE}
    places = {"run": "(reports.plots)", "datasets": "(reports.data_report)", "evaluation": "(reports.report)"}
    places |= {"eda": "(reports.augmented_file)", "export": "(reports.export_report)"}
    assert aside == set(places.items())
    graph = {name: {module for module in modules if "(" not in module} for name, modules in LISTED.items()}
    longest_chain(graph)
    core = {name: graph[name] for name in CORE if not name.startswith("ops.")}
    assert longest_chain({**core, "ops": set()}) <= NUM_FLOORS


@pytest.mark.parametrize("name", [name for name in LISTED if not name.startswith("ops")])
def test_outside_of_ops_nobody_has_heard_of_its_modules_and_machines(name: str) -> None:
    assert not [module for module in LISTED[name] if module.startswith("ops.")]
    source = io.StringIO(path_of(name).read_text("utf-8"))
    words = [token.string for token in tokenize.generate_tokens(source.readline) if token.type != tokenize.STRING]
    assert not [word for word in words if "kernel" in word.lower() or "ctypes" in word]  # strings: what a run tells


@pytest.mark.parametrize("name", LISTED)
def test_libraries_that_the_name_of_datasets_would_break_stay_out(name: str) -> None:
    firsts = {module.split(".")[0] for module, _ in imported(path_of(name))}
    assert not firsts & {"transformers", "sentence_transformers", "evaluate"}


def test_importing_everything_a_step_and_loading_load_nothing_heavy_and_draw_no_random_numbers(tmp_path: Path) -> None:
    """torch imports its compiler, two seconds of work, for modules on the meta device and for its own optimizers. The
    embedded model is files alone: the code of its package does not run, and nobody asks for sentence_transformers."""
    write_tokenizer(tmp_path, "modernbert")
    script = f"""
import pathlib, random, sys
import numpy as np, torch

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sentence_transformers":
            raise SystemExit(f"{{name}} is asked for")

sys.meta_path.insert(0, Watch())

def state():
    return random.getstate(), repr(np.random.get_state()), torch.random.get_rng_state().tolist()

before = state()
for name in {sorted(set(LISTED) - {"ops.triton_kernels"})!r}:  # which torch has no Triton for on every machine
    __import__(name)
from bert import BertConfig, empty_bert
from model import Layout, MultitaskBert
from ops import adamw_step
from flat_parameters import FlatParameters
from pal import ProjectedAttention
from parameters import Choice
config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
layout = Layout({{"sst": Choice("linear")}}, Choice("pal", ProjectedAttention.Parameters(size=4, heads=2)))
model = MultitaskBert(empty_bert(config), layout, torch.Generator())
flat = FlatParameters(dict(model.named_parameters()))
adamw_step([flat.moved_by(flat.gradients[0])], torch.tensor(1e-3), 0.1, torch.ones(()), torch.zeros(()))
from checkpoints import EMBEDDED_PACKAGE, find_checkpoint, load_bert
from datasets import Tokenizer
load_bert(find_checkpoint("minilm"), torch.Generator())
Tokenizer(find_checkpoint("minilm"), 64).encode([("one text",)])
Tokenizer(pathlib.Path({str(tmp_path)!r}), 9)
assert before == state(), "a generator was touched"
print([name for name in (*{(*HEAVY, "torch._dynamo")!r}, EMBEDDED_PACKAGE) if name in sys.modules])
"""
    assert run_python("-c", script) == "[]\n"
