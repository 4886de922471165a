"""torchjd's methods as gradient treatments, by their names there (Quinton and Rey 2024, arXiv 2406.16232; torchjd.org).

An aggregator makes one vector of the Jacobian of the losses, whose rows are the task gradients. One that asks for the
Jacobian gets a square root of the Gram matrix, (T, T): the task gradients in coordinates of the space that they span,
which is the same to whatever goes by lengths and angles. A scalarizer makes one loss of all; its derivatives by the
losses are the weights of the task gradients. torchjd is an optional dependency.

Shape letters: T tasks, S segments of the shared parameters that are treated on their own.
"""

import importlib
import inspect
import random
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parameters import NoParameters

# By name the arguments for which torchjd has no default, or that are ours (lr): as in the papers' experiments.
SCALARIZERS: Mapping[str, str] = MappingProxyType(
    {"COSMOS": "lambda_=1 weights=1", "DWA": "", "GeometricMean": "", "IMTLL": "lr=0.01", "PBI": "theta=5 weights=1"}
    | {"STCH": "mu=0.1", "UW": "lr=0.01"}
)
_WITHOUT_ARGUMENTS = (
    *("AlignedMTL", "ConFIG", "Constant", "DualProj", "GradVac", "IMTLG", "MGDA", "Mean", "NashMTL", "PCD", "PCGrad"),
    *("Random", "Sum", "UPGrad"),
)
AGGREGATORS: Mapping[str, str] = MappingProxyType(
    {"CAGrad": "c=0.4", "CRMOGM": "weighting=MGDA", "FairGrad": "alpha=2", "Krum": "n_byzantine=0"}
    | dict.fromkeys(_WITHOUT_ARGUMENTS, "")
)
METHODS: Mapping[str, str] = MappingProxyType(dict(sorted({**AGGREGATORS, **SCALARIZERS}.items())))
_BY_COORDINATE = "works on single coordinates of the gradients, of which their inner products tell nothing"
_TWO_BATCHES = "needs each task's gradients on two independent batches"
REFUSED: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("ExcessMTL", "GradDrop", "TrimmedMean"), _BY_COORDINATE)
    | dict.fromkeys(("MoDo", "SDMGrad"), _TWO_BATCHES)
    | {"FAMO": "needs the losses of a step's rows once more after the step"}
)


def torchjd_treatment(
    name: str, arguments: Sequence[str], parameters: NoParameters, num_tasks: int, num_segments: int
) -> "JacobianDescent | LossWeights":
    """A method of torchjd. arguments: of its constructor, NAME=VALUE; a vector is one number a task, 1,2,0.5.

    Raises ValueError where torchjd is not installed, or what the method needs, and if it is not offered, takes other
    arguments or not so many tasks.
    """
    if name not in METHODS:
        raise ValueError(f"--treatment {name}: {REFUSED.get(name, 'expected one of ' + ', '.join(METHODS))}")
    try:
        importlib.import_module("torchjd.aggregation")
    except ImportError:
        raise ValueError(f"--treatment {name}: torchjd is not installed (pip install torchjd)") from None
    try:
        if name in SCALARIZERS:
            return LossWeights(name, arguments, num_tasks)
        return JacobianDescent(name, arguments, num_tasks, num_segments)
    except (ArithmeticError, AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"--treatment {name}: {' '.join(str(error).split())}") from None


class JacobianDescent:
    """An aggregator.

    state: what it keeps from call to call, for each segment, and the number of its calls; empty for most.
    """

    def __init__(self, name: str, arguments: Sequence[str], num_tasks: int, num_segments: int) -> None:
        self.aggregator = _made(name, _given(name, arguments), num_tasks)
        self.stateful = [part for part in self.aggregator.modules() if hasattr(part, "reset")]
        self.state: dict[str, Tensor] = {}
        example = torch.eye(num_tasks, dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            first, second = self._weights(example), self._weights(4 * example)
        self.is_scale_free = not self.stateful and torch.allclose(first, second)
        if self.stateful:
            kept = {**_kept(self.aggregator), "calls": torch.zeros(())}
            self.state = {key: torch.zeros(num_segments, *value.shape).double() for key, value in kept.items()}

    def coefficients(
        self, gramians: Tensor, places: Sequence[int], generator: random.Random, losses: Tensor, epoch: int
    ) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # some aggregators draw from torch's global generator
            torch.manual_seed(generator.getrandbits(63))
            weights = [self._segment_weights(segment, gramian) for segment, gramian in enumerate(gramians)]
        return torch.diag_embed(torch.stack(weights))  # (S, T) -> (S, T, T)

    def _segment_weights(self, segment: int, gramian: Tensor) -> Tensor:
        """(T,) weights of the gradients in a segment; its part of the state is taken up before and put back after."""
        scale = gramian.diagonal().mean()
        if self.is_scale_free and scale > 0:
            gramian = gramian / scale  # torchjd compares with absolute tolerances
        state = {key: value[segment] for key, value in self.state.items()}
        if state and state["calls"] > 0:
            _take_up(self.aggregator, state)
        else:
            for part in self.stateful:
                part.reset()
        weights = self._weights(gramian)
        for key, value in (_kept(self.aggregator) if state else {}).items():
            state[key].copy_(value)
        if state:
            state["calls"] += 1
        return weights

    def _weights(self, gramian: Tensor) -> Tensor:
        """(T,) weights of the task gradients."""
        if hasattr(self.aggregator, "gramian_weighting"):
            return self.aggregator.gramian_weighting(gramian)  # type: ignore[no-any-return]
        values, vectors = torch.linalg.eigh(gramian)
        root = vectors * values.clamp(min=0).sqrt()  # (T, T), root @ root.T is the Gram matrix
        root[gramian.diagonal() == 0] = 0  # not the rounding of a gradient without length
        return self.aggregator(root) @ torch.linalg.pinv(root)  # type: ignore[no-any-return]


def _kept(module: nn.Module) -> dict[str, Tensor]:
    """What torchjd changes from call to call, by its place: buffers, and of NashMTL numbers without an underscore."""
    found: dict[str, Tensor] = {}
    for place, part in module.named_modules():
        numbers = {key: value for key, value in vars(part).items() if key[0] != "_"}
        for key, value in {**dict(part.named_buffers(recurse=False)), **numbers}.items():
            if isinstance(value, float | np.ndarray | Tensor):
                found[f"{place}.{key}"] = torch.as_tensor(value)
    return found


def _take_up(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts back what `_kept` found; the module has been called before."""
    for name in _kept(module):
        place, _, key = name.rpartition(".")
        part = module.get_submodule(place)
        kind, value = type(getattr(part, key)), state[name].clone()
        setattr(part, key, float(value) if kind is float else value.numpy() if kind is np.ndarray else value)


class LossWeights:
    """A scalarizer: the weights of the losses are those of the gradients of the shared parameters.

    state: its own parameters, which each step moves down their gradient by lr; for DWA sums of the losses in this
    epoch, the last and the one before, and the numbers of their steps.
    """

    def __init__(self, name: str, arguments: Sequence[str], num_tasks: int) -> None:
        given = _given(name, arguments)
        self.lr = _value("lr", given.pop("lr"), "float", 1) if "lr" in SCALARIZERS[name] else 0.0
        self.scalarizer = _made(name, given, num_tasks).double()
        self.averages_epochs = name == "DWA"
        self.state = dict(self.scalarizer.state_dict())
        if self.averages_epochs:
            self.state = {"sums": torch.zeros(3, num_tasks).double(), "steps": torch.zeros(3, 1).double()}
            self.state["epoch"] = torch.ones(1, dtype=torch.float64)
        self._weights(torch.ones(num_tasks, dtype=torch.float64), is_trial=True)

    def coefficients(
        self, gramians: Tensor, places: Sequence[int], generator: random.Random, losses: Tensor, epoch: int
    ) -> Tensor:
        weights = self._epoch_weights(losses, epoch) if self.averages_epochs else self._weights(losses)
        return torch.diag(weights).repeat(len(gramians), 1, 1)  # (T,) -> (S, T, T)

    @torch.enable_grad()
    def _weights(self, losses: Tensor, is_trial: bool = False) -> Tensor:
        values, own = losses.double().clone().requires_grad_(), list(self.scalarizer.parameters())
        weights, *slopes = torch.autograd.grad(self.scalarizer(values), [values, *own])
        for parameter, slope in zip(own, slopes, strict=True):
            parameter.data -= 0 if is_trial else self.lr * slope
        return weights

    def _epoch_weights(self, losses: Tensor, epoch: int) -> Tensor:
        """torchjd's DWA with its averages in the state: T times the softmax of how the epochs' mean losses fell."""
        sums, steps = self.state["sums"], self.state["steps"]
        if epoch > self.state["epoch"] and steps[0] > 0:
            for values in (sums, steps):
                values.copy_(values.roll(1, 0))
                values[0] = 0
        self.state["epoch"].fill_(epoch)
        sums[0] += losses
        steps[0] += 1
        if steps[2] == 0:
            return torch.ones_like(losses)
        _, last, before = sums / steps  # each (T,)
        return len(losses) * torch.softmax(last / before / self.scalarizer.temperature, 0)


# ------------------------------------------------------------------------------------------------------ arguments


def _given(name: str, arguments: Sequence[str]) -> dict[str, str]:
    """The arguments of a method by name, over those that it needs."""
    return dict(item.partition("=")[::2] for item in (*METHODS[name].split(), *arguments))


def _made(name: str, given: Mapping[str, str], num_tasks: int) -> Any:
    """The object of torchjd. Raises ValueError for arguments that it does not take."""
    package = importlib.import_module(f"torchjd.{'scalarization' if name in SCALARIZERS else 'aggregation'}")
    kind = getattr(package, name, None) or getattr(package, f"{name}Weighting", None)
    if kind is None:
        raise ValueError("this version of torchjd does not have it")
    signature = inspect.signature(kind).parameters
    fixed = {key: num_tasks for key in ("n_tasks", "shape") if key in signature}
    types = {key: str(value.annotation) for key, value in signature.items() if key not in fixed}
    types = {key: of for key, of in types.items() if re.search(r"\b(int|float|Tensor|Literal|Weighting)\b", of)}
    needed = {key for key in types if signature[key].default is inspect.Parameter.empty}
    if wrong := sorted(needed.symmetric_difference(given) - (set(types) - needed)):
        raise ValueError(
            f"--treatment_arguments {' '.join(wrong)}: expected NAME=VALUE of {', '.join(types) or 'none'}"
        )
    made = kind(**fixed, **{key: _value(key, text, types[key], num_tasks) for key, text in given.items()})
    return package.GramianWeightedAggregator(made) if name == "CRMOGM" else made


def _value(key: str, text: str, of: str, num_tasks: int) -> Any:
    """An argument as its annotation says: a weighting by its name, a word, a number, or a vector (T,)."""
    if "Weighting" in of:
        found: Any = _made(text, _given(text, ()), num_tasks) if text in AGGREGATORS else None
        if not hasattr(found, "gramian_weighting"):
            raise ValueError(f"--treatment_arguments {key}={text}: expected a weighting of Gram matrices, such as MGDA")
        return found.gramian_weighting
    if "Literal" in of:
        return text
    try:
        numbers = [(float if re.search("float|Tensor", of) else int)(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or ("Tensor" not in of and len(numbers) > 1):
        raise ValueError(f"--treatment_arguments {key}={text}: expected a number, or for a vector one a task: 1,2,0.5")
    if "Tensor" not in of or ("float" in of and len(numbers) == 1):
        return numbers[0]
    return torch.tensor(numbers * (num_tasks if len(numbers) == 1 else 1), dtype=torch.float64)
