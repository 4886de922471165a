"""The import graph of the program, floor by floor, and what importing it does: nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = {
    "tasks",
    "kernels",
    "dense",
    "bert",
    "schedulers",
    "pcgrad",
    "smart",
    "eda",
    "run_record",
    "seeding",
    "console",
    "tsv",
    "optimizer",
}
BELOW_MODEL = GROUND | {"pal", "datasets"}
BELOW_EVALUATION = BELOW_MODEL | {"model"}
BELOW_ENGINE = BELOW_EVALUATION | {"evaluation", "regularizers"}

# Of each module of ours, which others it may import, at its top or inside a function.
ALLOWED: dict[str, set[str]] = {
    **{name: set() for name in GROUND},
    "dense": {"kernels"},
    "bert": {"dense", "kernels"},
    "optimizer": {"kernels"},
    "pcgrad": {"kernels"},
    "pal": {"bert", "dense"},
    "eda": {"tsv"},
    "datasets": {"tasks", "bert", "eda", "tsv", "reports"},  # reports: only as its command
    "token_cache": {"tasks", "datasets"},
    "config": GROUND | {"pal"},
    "model": {"bert", "pal", "tasks", "datasets"},
    "prediction": {"tasks", "model"},
    "evaluation": BELOW_EVALUATION | {"reports"},  # reports: only as its command
    "regularizers": BELOW_EVALUATION,
    "engine": BELOW_ENGINE,
    "run_data": GROUND | {"config", "datasets", "token_cache"},
    "multitask_classifier": BELOW_ENGINE | {"config", "engine", "run_data", "prediction", "reports"},  # for its plots
}
REPORTS = {
    "command": {"run_record"},
    "document": set(),
    "finished_run": {"tasks", "run_record", "datasets"},
    "error_analysis": {"tasks", "run_record", "datasets"},
    "comparison": {"tasks", "run_record", "config", "finished_run"},
    "plots": {"tasks", "run_record", "finished_run", "comparison"},
    "data_report": {"tasks", "bert", "datasets", "command", "plots"},
    "report": {
        "tasks", "run_record", "console", "command", "comparison", "document", "error_analysis", "finished_run", "plots"
    },
}  # fmt: skip
HEAVY = ("transformers", "sentence_transformers", "sklearn", "scipy", "matplotlib", "nltk", "tensorboard")


def imported_modules(path: Path) -> set[str]:
    """First parts of all imports in a file, lazy ones and importlib's with a literal name included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            names.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names |= {str(arg.value).split(".")[0] for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def test_every_module_of_the_program_has_a_floor() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == set(ALLOWED)
    assert {path.stem for path in ROOT.glob("reports/*.py")} == {*REPORTS, "__init__"}


@pytest.mark.parametrize("name", sorted(REPORTS))
def test_a_report_imports_the_core_and_lower_reports_only(name: str) -> None:
    path = ROOT / "reports" / f"{name}.py"
    core = imported_modules(path) & set(ALLOWED)
    own = set(re.findall(r"^ *from reports\.(\w+) import", path.read_text("utf-8"), flags=re.MULTILINE))
    assert core | own <= REPORTS[name], f"{name}.py imports {sorted((core | own) - REPORTS[name])}"


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_module_imports_lower_floors_only(name: str) -> None:
    ours = imported_modules(ROOT / f"{name}.py") & {*ALLOWED, "reports"}
    assert ours <= ALLOWED[name], f"{name}.py imports {sorted(ours - ALLOWED[name])}"


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_libraries_that_the_name_of_datasets_would_break_stay_out(name: str) -> None:
    assert not imported_modules(ROOT / f"{name}.py") & {"transformers", "sentence_transformers", "evaluate"}


def test_importing_everything_touches_no_generator_and_loads_nothing_heavy() -> None:
    script = f"""
import random, sys
import numpy as np, torch
before = random.getstate(), [part.tobytes() if hasattr(part, "tobytes") else part for part in np.random.get_state()]
torch_before = torch.random.get_rng_state()
for name in {sorted([*ALLOWED, *(f"reports.{name}" for name in REPORTS)])!r}:
    __import__(name)
after = random.getstate(), [part.tobytes() if hasattr(part, "tobytes") else part for part in np.random.get_state()]
assert before == after and torch_before.equal(torch.random.get_rng_state()), "a generator was touched"
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stdout + done.stderr


def test_making_a_model_and_a_step_import_no_compiler_and_draw_no_random_numbers() -> None:
    """torch imports its compiler, two seconds of work, for modules on the meta device and for its own optimizers."""
    script = """
import sys, torch
from bert import BertConfig, empty_bert
from model import Layout, MultitaskBert
from optimizer import AdamW
from pal import PalConfig
before = torch.random.get_rng_state()
config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
layout = Layout(("sst",), 1, PalConfig("attention", 4, 2, 1))
model = MultitaskBert(empty_bert(config), layout, torch.Generator())
parameters = dict(model.named_parameters())
for parameter in parameters.values():
    parameter.grad = torch.zeros_like(parameter)
AdamW(parameters, 0.1).step(1e-3)
assert torch.random.get_rng_state().equal(before), "a generator was touched"
assert "torch._dynamo" not in sys.modules, "torch's compiler was imported"
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
