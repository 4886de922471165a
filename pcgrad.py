"""Gradient treatments: how the gradients of several tasks are aggregated (PCGrad, Gradient Vaccine; torchjd's in
jacobian_descent.py).

Every projection in these methods is a linear combination of the original task gradients. A treatment therefore maps the
Gram matrix of the task gradients, T x T inner products, to a T x T matrix of coefficients; row i says what becomes of
task i's gradient. The P-dimensional gradients are touched twice only: for the Gram matrix and for the weighted sum.
A new treatment is a class and an entry of TREATMENTS.

Shape letters: T tasks of a step, P shared parameters, S segments of them that are treated on their own.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

import ops
from jacobian_descent import torchjd_treatment
from parameters import NoParameters, parameter

VANISHING = 1e-15  # of a length; two such ratios multiplied are within float32


class Treatment(Protocol):
    """Maps Gram matrices of task gradients to coefficients: once a step, of finite numbers only, all on the host.

    What it is given are gradients with their draw weights, brought to equal lengths unless --gradient_scale says
    otherwise. state: running averages, which a checkpoint holds; tensors on the host that are changed in place, none
    for most. Parameters of its own stand in a frozen dataclass `Parameters` (see GradientVaccine); an entry of
    TREATMENTS makes its flags.
    """

    state: dict[str, Tensor]

    def __init__(self, parameters: Any, num_tasks: int, num_segments: int) -> None: ...

    def coefficients(
        self, gramians: Tensor, places: Sequence[int], generator: random.Random, losses: Tensor, epoch: int
    ) -> Tensor:
        """(S, T, T) coefficients: task i's treated gradient is the sum over j of coefficients[s, i, j] * gradient[j].

        gramians: (S, T, T) inner products over each segment, float64. places: T places, of the step's tasks among all.
        losses: (T,) mean losses of the tasks' rows, float64. epoch: from 1.
        """
        ...


def _check_square(gramian: Tensor) -> int:
    if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1]:
        raise ValueError(f"gramian has shape {tuple(gramian.shape)}, expected (T, T)")
    return gramian.shape[0]


def random_orders(num_tasks: int, generator: random.Random) -> list[list[int]]:
    """For each task i the other tasks in random order."""
    orders = [[j for j in range(num_tasks) if j != i] for i in range(num_tasks)]
    for order in orders:
        generator.shuffle(order)
    return orders


def pcgrad_coefficients(gramian: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """What PCGrad makes of each task gradient (Yu et al. 2020, arXiv 2001.06782, algorithm 1).

    For each task i and every other task j in the given order: if g_i . g_j < 0, subtract from g_i its component along
    the original g_j. gramian: (T, T) inner products of the original gradients. Returns (T, T), row i in terms of the
    originals; the update direction has the weights `.sum(0)`. Raises ValueError if gramian is not square.
    """
    num_tasks = _check_square(gramian)
    gram = gramian.double().tolist()
    rows = []
    for i in range(num_tasks):
        row = [float(k == i) for k in range(num_tasks)]
        for j in orders[i]:
            dot = sum(row[k] * gram[k][j] for k in range(num_tasks))
            if dot < 0 and gram[j][j] > 0:
                row[j] -= dot / gram[j][j]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def gradvac_coefficients(
    gramian: Tensor, targets: Tensor, beta: float, orders: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """What Gradient Vaccine makes of each task gradient (Wang et al. 2021, arXiv 2010.05874, algorithm 1).

    For each task i and every other task j in the given order, phi is the cosine of the current g_i and the original
    g_j. Where phi is below the target t, g_j is added to g_i with the factor that makes the cosine t. The target then
    moves by beta towards phi, whether it was below or not. A pair with a zero gradient has no cosine and is left alone.

    gramian: (T, T); targets: (T, T) cosines. Returns the (T, T) coefficients and the new targets.
    Raises ValueError if gramian is not square.
    """
    num_tasks = _check_square(gramian)
    gram, new_targets = gramian.double().tolist(), targets.double().tolist()
    rows = []
    for i in range(num_tasks):
        row = [float(k == i) for k in range(num_tasks)]
        for j in orders[i]:
            dots = [sum(row[k] * gram[k][m] for k in range(num_tasks)) for m in range(num_tasks)]
            squared_norm = sum(row[m] * dots[m] for m in range(num_tasks))
            if squared_norm <= 0 or gram[j][j] <= 0:
                continue
            norm, other_norm = squared_norm**0.5, gram[j][j] ** 0.5
            phi = min(1.0, max(-1.0, dots[j] / (norm * other_norm)))
            target = new_targets[i][j]
            if phi < target:
                row[j] += norm * _vaccine_factor(phi, target) / other_norm
            new_targets[i][j] = (1 - beta) * target + beta * phi
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(new_targets, dtype=torch.float64)


def _vaccine_factor(phi: float, target: float) -> float:
    """(t sqrt(1 - phi^2) - phi sqrt(1 - t^2)) / sqrt(1 - t^2); the target is kept off 1, where it has no limit."""
    target = min(target, 1 - 1e-6)
    sine = (1 - target**2) ** 0.5
    return float((target * (1 - phi**2) ** 0.5 - phi * sine) / sine)


class PCGrad:
    """Projects conflicting gradients (Yu et al. 2020)."""

    def __init__(self, parameters: NoParameters, num_tasks: int, num_segments: int) -> None:
        self.state: dict[str, Tensor] = {}

    def coefficients(
        self, gramians: Tensor, places: Sequence[int], generator: random.Random, losses: Tensor, epoch: int
    ) -> Tensor:
        orders = random_orders(len(places), generator)
        return torch.stack([pcgrad_coefficients(gramian, orders) for gramian in gramians])  # (S, T, T)


class GradientVaccine:
    """Keeps pairs of tasks at least as similar as they have been on average (Wang et al. 2021).

    state["targets"]: (S, tasks, tasks) averages of the cosines, from 0 on.
    """

    @dataclass(frozen=True)
    class Parameters:
        beta: float = parameter(0.01, "how far a step moves Gradient Vaccine's target cosines", "0 < x <= 1")

    def __init__(self, parameters: Parameters, num_tasks: int, num_segments: int) -> None:
        self.beta = parameters.beta
        self.state = {"targets": torch.zeros(num_segments, num_tasks, num_tasks, dtype=torch.float64)}

    def coefficients(
        self, gramians: Tensor, places: Sequence[int], generator: random.Random, losses: Tensor, epoch: int
    ) -> Tensor:
        orders = random_orders(len(places), generator)
        present = torch.tensor(list(places))
        coefficients = []
        for gramian, targets in zip(gramians, self.state["targets"], strict=True):
            of_step = targets[present[:, None], present]  # (T, T)
            rows, targets[present[:, None], present] = gradvac_coefficients(gramian, of_step, self.beta, orders)
            coefficients.append(rows)
        return torch.stack(coefficients)  # (S, T, T)


TREATMENTS: dict[str, type[Treatment]] = {"pcgrad": PCGrad, "gradvac": GradientVaccine}


def find_treatment(name: str, arguments: Sequence[str] = ()) -> Callable[[Any, int, int], Treatment]:
    """The treatment of a name: one of TREATMENTS, else a method of torchjd with these arguments, which when it is made
    raises ValueError if it cannot be had."""
    return TREATMENTS[name] if name in TREATMENTS else partial(torchjd_treatment, name, arguments)


# --------------------------------------------------------------------------------------------- the long vectors


def gramians_of(gradients: Tensor, segments: Sequence[Sequence[slice]], dtype: torch.dtype = torch.float32) -> Tensor:
    """(S, T, T) inner products of task gradients (T, P) over each segment, which is some ranges of columns; float64.

    dtype: in which products are summed, see ops.gramian.
    """
    none = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=gradients.device)
    parts_of = [[none, *(ops.gramian(gradients[:, part], dtype) for part in parts)] for parts in segments]
    return torch.stack([torch.stack(parts).sum(0) for parts in parts_of])


def without_vanishing(gramians: Tensor) -> Tensor:
    """The inner products (S, T, T), zero where a task's gradient of a segment is VANISHING beside the longest there.

    Of a task that is solved it may be 1e-40: no float32 holds the factor that brings it to the others' length, or that
    takes their part along it away.
    """
    lengths = gramians.diagonal(dim1=-2, dim2=-1).sqrt()  # (S, T)
    stays = lengths > VANISHING * lengths.amax(-1, keepdim=True)
    return torch.where(stays[:, :, None] & stays[:, None, :], gramians, 0.0)


def equal_lengths(gramians: Tensor, weights: Tensor) -> Tensor:
    """(T,) factors that bring the task gradients to their mean length, before their weights (T,) count.

    A treatment compares directions, but its sum is led by the longest gradient: squared errors on a scale of five are
    worth several cross entropies. gramians: (S, T, T), of the weighted gradients. 1 for a gradient of zero.
    """
    lengths = gramians.sum(0).diagonal().sqrt() / weights
    return torch.where(lengths > 0, lengths.mean() / lengths, 1.0)


def combine(gradients: Tensor, weights: Tensor, segments: Sequence[Sequence[slice]]) -> None:
    """On each segment s the sum over t of weights[s, t] * gradients[t], in place of the first of the gradients (T, P).

    weights: (S, T), on the host.
    """
    for parts, of_segment in zip(segments, weights, strict=True):
        for part in parts:
            ops.weighted_sum(gradients[:, part], of_segment)


# ------------------------------------------------------------------------------------------------- diagnostics


def cosines(gramian: Tensor) -> Tensor:
    """(T, T) cosines between the gradients; NaN where a gradient is zero."""
    norms = gramian.diagonal().sqrt()
    return (gramian / norms[:, None] / norms).clamp(-1, 1)


def removed_shares(squared_norms: Tensor, kept: Tensor) -> Tensor:
    """(T,) which share of each task's own gradient a treatment takes out of it.

    squared_norms: (T,) g_i . g_i; kept: (T,) g_i' . g_i, g_i' the treated gradient. 1 - kept / squared norm, not below
    0: 0 for an untouched gradient, cos^2 of the angle to g_j after one projection away from g_j. NaN for a zero
    gradient.
    """
    return (1 - kept / squared_norms).clamp(min=0)
