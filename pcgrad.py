"""Gradient treatments: how the gradients of several tasks become one (PCGrad, Gradient Vaccine, torchjd's).

Every projection in these methods is a linear combination of the original task gradients. A treatment therefore maps the
Gram matrix of the task gradients, T x T inner products, to a T x T matrix of coefficients; row i says what becomes of
task i's gradient. The P-dimensional gradients are touched twice only: for the Gram matrix and for the weighted sum.

`TaskGradients` keeps one contiguous buffer a task; every `parameter.grad` is a view into the buffer of the task whose
backward pass is running, so that autograd accumulates straight into it.

Shape letters: T tasks of a step, P shared parameters, S segments of them that are treated on their own.
"""

import importlib
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import kernels


class Treatment(Protocol):
    """Maps Gram matrices of task gradients to coefficients. May keep running averages between steps."""

    def coefficients(self, gramians: Tensor, tasks: Sequence[int], generator: random.Random) -> Tensor:
        """(S, T, T) coefficients: task i's treated gradient is the sum over j of coefficients[s, i, j] * gradient[j].

        gramians: (S, T, T) inner products over each segment, float64. tasks: which of all tasks the T rows are.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Running averages, for a checkpoint; empty where there are none."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the running averages of a checkpoint."""
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


def pcgrad_weights(gramian: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """(T,) weights of the original gradients in PCGrad's update, the sum over the treated task gradients."""
    return pcgrad_coefficients(gramian, orders).sum(0)


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


class Sum:
    """No treatment: the update is the sum of the task gradients, which accumulate in a single buffer."""

    def coefficients(self, gramians: Tensor, tasks: Sequence[int], generator: random.Random) -> Tensor:
        return torch.eye(gramians.shape[-1], dtype=torch.float64).expand_as(gramians)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        pass


class PCGrad(Sum):
    """Projecting conflicting gradients."""

    def coefficients(self, gramians: Tensor, tasks: Sequence[int], generator: random.Random) -> Tensor:
        orders = random_orders(len(tasks), generator)
        return torch.stack([pcgrad_coefficients(gramian, orders) for gramian in gramians])


class GradientVaccine:
    """Gradient Vaccine: pairs of tasks are kept at least as similar as they have been on average.

    beta: how far a step moves the average, above 0 and at most 1. targets: (S, tasks, tasks) averages of the cosines,
    from 0 on.
    """

    def __init__(self, num_tasks: int, num_segments: int, beta: float = 0.01) -> None:
        self.beta = beta
        self.targets = torch.zeros(num_segments, num_tasks, num_tasks, dtype=torch.float64)

    def coefficients(self, gramians: Tensor, tasks: Sequence[int], generator: random.Random) -> Tensor:
        orders = random_orders(len(tasks), generator)
        present = torch.tensor(list(tasks))
        coefficients = []
        for gramian, targets in zip(gramians, self.targets, strict=True):
            of_step = targets[present[:, None], present]
            rows, targets[present[:, None], present] = gradvac_coefficients(gramian, of_step, self.beta, orders)
            coefficients.append(rows)
        return torch.stack(coefficients)

    def state(self) -> dict[str, Tensor]:
        return {"targets": self.targets}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.targets.copy_(state["targets"])


class JacobianDescent(Sum):
    """A Gramian weighting of torchjd by its name, such as UPGrad or MGDA; torchjd is an optional dependency.

    Raises ValueError if torchjd is not installed or has no such weighting of Gramians.
    """

    def __init__(self, name: str) -> None:
        try:
            aggregation = importlib.import_module("torchjd.aggregation")
        except ImportError:
            raise ValueError(
                f"--treatment {name}: torchjd is not installed (pip install torchjd); without it there are "
                + ", ".join(TREATMENTS)
            ) from None
        self.name = name
        self.weighting = _gramian_weighting(aggregation, name)

    def coefficients(self, gramians: Tensor, tasks: Sequence[int], generator: random.Random) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # some weightings draw from torch's global generator
            torch.manual_seed(generator.getrandbits(63))
            weights = [self.weighting(_scaled(gramian)) for gramian in gramians]
        return torch.stack([torch.diag(weight.double()) for weight in weights])


def _scaled(gramian: Tensor) -> Tensor:
    """A Gram matrix with mean diagonal 1: the weightings of torchjd compare with absolute tolerances."""
    scale = gramian.diagonal().mean()
    return gramian / scale if scale > 0 else gramian


def gramian_weightings() -> list[str]:
    """The names of torchjd's Gramian weightings that need no further argument; empty where it is not installed."""
    try:
        aggregation = importlib.import_module("torchjd.aggregation")
    except ImportError:
        return []
    names = [name.removesuffix("Weighting") for name in dir(aggregation) if name.endswith("Weighting")]
    return sorted(name for name in names if _is_gramian_weighting(aggregation, name))


def _is_gramian_weighting(aggregation: Any, name: str) -> bool:
    try:
        _gramian_weighting(aggregation, name)
    except ValueError:
        return False
    return True


def _gramian_weighting(aggregation: Any, name: str) -> Callable[[Tensor], Tensor]:
    kind = getattr(aggregation, f"{name}Weighting", None)
    base = aggregation.UPGradWeighting.__bases__[0]  # the weightings of Gramians; not every version names it
    if not (isinstance(kind, type) and issubclass(kind, base) and kind is not base):
        raise ValueError(f"--treatment {name}: torchjd has no such weighting of Gramians")
    if hasattr(kind, "reset"):
        raise ValueError(f"--treatment {name}: torchjd's keeps averages that a checkpoint would not hold")
    try:
        return kind()  # type: ignore[no-any-return]
    except (TypeError, ImportError) as error:
        raise ValueError(f"--treatment {name}: {error}") from None


TREATMENTS: Mapping[str, Callable[[int, int, float], Treatment]] = MappingProxyType(
    {
        "sum": lambda num_tasks, num_segments, beta: Sum(),
        "pcgrad": lambda num_tasks, num_segments, beta: PCGrad(),
        "gradvac": GradientVaccine,
    }
)


def make_treatment(name: str, num_tasks: int, num_segments: int, gradvac_beta: float) -> Treatment:
    """The treatment of a name: one of ours, else a weighting of torchjd. Raises ValueError for an unknown name."""
    make = TREATMENTS.get(name)
    return JacobianDescent(name) if make is None else make(num_tasks, num_segments, gradvac_beta)


# --------------------------------------------------------------------------------------------------- gradients


class TaskGradients:
    """Gradients of the shared parameters, a row of one buffer for each task of a step.

    parameters: the shared parameters, in an order that keeps each segment together. segment_sizes: how many of the
    parameter tensors make up each segment. num_rows: T, or 1 where the tasks' gradients are only summed.

    embedding: one of the parameters, a matrix, of which a batch has gradients in few lines; `touch` says in which. All
    others are zero and nothing here looks at them.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        num_rows: int,
        segment_sizes: Sequence[int],
        embedding: nn.Parameter | None = None,
    ) -> None:
        if sum(segment_sizes) != len(parameters):
            raise ValueError(f"segments of {sum(segment_sizes)} tensors for {len(parameters)} parameters")
        self.parameters = list(parameters)
        counts = [parameter.numel() for parameter in parameters]
        like = parameters[0] if parameters else torch.empty(0)
        self.rows = torch.zeros(num_rows, sum(counts), dtype=torch.float32, device=like.device)
        self._views = [
            [part.view_as(p) for part, p in zip(row.split(counts), parameters, strict=True)] if parameters else []
            for row in self.rows
        ]
        self._place = next((i for i, p in enumerate(parameters) if p is embedding), None)
        self._touched: list[list[Tensor]] = [[] for _ in range(num_rows)]
        self._segments: list[list[Tensor]] = []  # of each segment its columns (T, P'), without the embedding's
        self._embedding_segment, first, numbers = 0, 0, iter(range(len(counts)))
        for number, size in enumerate(segment_sizes):
            bounds = [[first, first]]
            for i in itertools.islice(numbers, size):
                first += counts[i]
                if i == self._place:
                    self._embedding_segment = number
                    bounds.append([first, first])
                bounds[-1][1] = first
            self._segments.append([self.rows[:, start:end] for start, end in bounds if end > start])

    def touch(self, row: int, lines: Tensor) -> None:
        """A backward pass into a row is about to add to these lines of the embedding; (N,), in any order."""
        self._touched[row].append(lines)

    def touched(self, rows: Sequence[int]) -> Tensor:
        """The lines of the embedding that any of these rows may have gradients in, each once."""
        lines = [part for row in rows for part in self._touched[row]]
        return torch.cat(lines).unique() if lines else torch.empty(0, dtype=torch.long, device=self.rows.device)

    def zero(self) -> None:
        for parts in self._segments:
            for part in parts:
                part.zero_()
        if self._place is not None:
            for row, views in enumerate(self._views):
                views[self._place].index_fill_(0, self.touched([row]), 0.0)
                self._touched[row].clear()

    def point_to(self, row: int) -> None:
        """From here on backward passes accumulate into a row."""
        for parameter, view in zip(self.parameters, self._views[row], strict=True):
            parameter.grad = view

    def parts(self, row: int) -> list[Tensor]:
        """All numbers of a row that may not be zero, in contiguous tensors."""
        lines = [] if self._place is None else [self._views[row][self._place][self.touched([row])]]
        return [*(part[row] for parts in self._segments for part in parts), *lines]

    def gramians(self, rows: Sequence[int]) -> Tensor:
        """(S, T, T) inner products of rows over each segment, float64 on the CPU."""
        every = range(len(self.rows))
        zero = torch.zeros(len(every), len(every), dtype=torch.float64, device=self.rows.device)
        totals = [sum((gramian(part) for part in parts), zero) for parts in self._segments]
        if self._place is not None:
            lines = self.touched(every)
            found = torch.stack([views[self._place][lines].flatten() for views in self._views])
            totals[self._embedding_segment] = totals[self._embedding_segment] + gramian(found)
        index = torch.tensor(list(rows))
        return torch.stack(totals).cpu()[:, index[:, None], index]

    def combine(self, rows: Sequence[int], weights: Tensor) -> None:
        """Makes the gradient of the optimizer: on each segment the sum of weights[s, t] * rows[t]. weights: (S, T).

        The sum is built in the first of the rows, in place, and every parameter's `grad` shows it.
        """
        first, of_segments = rows[0], weights.tolist()
        for parts, weight in zip(self._segments, of_segments, strict=True):
            for part in parts:
                _weighted_sum_in_first([part[row] for row in rows], weight)
        if self._place is not None:
            lines, place = self.touched(rows), self._place
            factors = zip(rows, of_segments[self._embedding_segment], strict=True)
            total = sum((self._views[row][place][lines] * factor for row, factor in factors), torch.zeros(()))
            self._views[first][place][lines] = total
            self._touched[first] = [lines]
        self.point_to(first)


def _weighted_sum_in_first(rows: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Makes the first of these vectors the sum of weights[t] * rows[t]."""
    if kernels.usable(*rows):
        kernels.weighted_sum_in_first(rows, weights)
        return
    rows[0].mul_(weights[0])
    for row, factor in zip(rows[1:], weights[1:], strict=True):
        rows[0].add_(row, alpha=factor)


def gramian(rows: Tensor, chunk: int = 16384) -> Tensor:
    """(T, T) inner products of rows (T, P), float64.

    Products are summed in float32 within chunks and in float64 over them: one pass over memory. Where float32 cannot
    hold the products (entries beyond 1e19 or below 1e-19), the pass is repeated in float64.
    """
    result = _chunked_gramian(rows, chunk)
    diagonal = result.diagonal()
    if rows.dtype == torch.float32 and not (bool(result.isfinite().all()) and bool((diagonal > 1e-30).all())):
        result = torch.zeros_like(result)
        for part in rows.split(chunk * 64, dim=1):
            result += _chunked_gramian(part.double(), chunk)
    return result


def _chunked_gramian(rows: Tensor, chunk: int) -> Tensor:
    num_rows, size = rows.shape
    if kernels.usable(rows) and rows.stride(1) == 1:
        return kernels.block_gramians(rows, chunk).sum(0)
    whole = size // chunk * chunk
    blocks = rows[:, :whole].view(num_rows, -1, chunk).transpose(0, 1)  # (P / chunk, T, chunk)
    rest = rows[:, whole:]
    return torch.bmm(blocks, blocks.transpose(1, 2)).double().sum(0) + (rest @ rest.T).double()


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
