"""Parameters, their gradients, AdamW's moments and averages of the parameters in vectors of one layout.

Every parameter becomes a view into one vector, and its `grad` a view into another, so that autograd accumulates
straight into it and the optimizer is one pass over memory. For gradient treatments there is a gradient vector for each
task. Of several processes each moves a part of the vectors.

Shape letters: P parameters, T tasks.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distributed import ALONE, ProcessGroup
from ops import Moments, Vector

PIECE = 2**14


class FlatParameters:
    """Some parameters in one vector: first the matrices, which weight decay applies to, then biases and LayerNorms.

    values: (P,). gradients: (num_gradients, P), in which `point_to` chooses what backward passes accumulate into, and
    behind them zeros until they can be divided. part: which of the numbers this process moves; its moments are of these
    alone. sums: (num_gradients, part) of the gradients, behind `processes.finish_sums` of all processes.
    """

    @torch.no_grad()
    def __init__(
        self, parameters: Mapping[str, nn.Parameter], num_gradients: int = 1, processes: ProcessGroup = ALONE
    ) -> None:
        matrices = [name for name, parameter in parameters.items() if parameter.dim() > 1]
        self.names = [*matrices, *(name for name in parameters if name not in set(matrices))]
        self._parameters = [parameters[name] for name in self.names]
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self.num_decayed = sum(self._sizes[: len(matrices)])
        flat = [parameter.detach().flatten() for parameter in self._parameters]
        of_all = torch.cat(flat) if flat else torch.empty(0)
        self.processes, size = processes, processes.padded(len(of_all))
        self._padded = torch.cat([of_all, of_all.new_zeros(size - len(of_all))]) if size > len(of_all) else of_all
        self.values = self._padded[: len(of_all)]
        self.gradients = of_all.new_zeros(num_gradients, size)
        self.part = processes.part(size)
        self.sums = self.gradients[:, self.part]
        self.moments = Moments.zeros_like(self._padded[self.part])
        for parameter, value in zip(self._parameters, self._views(self.values), strict=True):
            parameter.data = value
        self._gradient_views = [self._views(gradient[: len(self)]) for gradient in self.gradients]
        self.point_to(0)

    def __len__(self) -> int:
        return len(self.values)

    def _views(self, vector: Tensor) -> list[Tensor]:
        """(P,) as tensors of the parameters' shapes."""
        parts = vector.split(self._sizes) if self._sizes else ()
        return [part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]

    def point_to(self, row: int) -> None:
        """From here on backward passes accumulate into this one of the gradients."""
        for parameter, view in zip(self._parameters, self._gradient_views[row], strict=True):
            parameter.grad = view

    def columns(self, names: Collection[str]) -> list[slice]:
        """Where the parameters of these names stand in `sums`: as few ranges as there are."""
        ranges: list[list[int]] = []
        first = 0
        for name, size in zip(self.names, self._sizes, strict=True):
            if name in names and ranges and ranges[-1][1] == first:
                ranges[-1][1] += size
            elif name in names:
                ranges.append([first, first + size])
            first += size
        bounds = [(self._place(first), self._place(end)) for first, end in ranges]
        return [slice(first, end) for first, end in bounds if first < end]

    def _place(self, column: int) -> int:
        """Where in this process's part a column stands, or which end of it is nearer."""
        first, end = int(self.part.start), int(self.part.stop)
        return min(max(column, first), end) - first

    def moved_by(self, gradient: Tensor) -> Vector:
        """What an AdamW step along gradient, (part,), moves."""
        return Vector(self._padded[self.part], gradient, self.moments, self._place(self.num_decayed))

    def spread(self) -> None:
        """Gives all processes the values that each has moved."""
        self.processes.gather(self._padded)

    def state(self) -> dict[str, Tensor]:
        """The moments, for a checkpoint: of one process they themselves, not copies."""
        return {name: self._whole(value) for name, value in vars(self.moments).items()}

    def _whole(self, part: Tensor) -> Tensor:
        if self.processes.size == 1 or part.dim() == 0:
            return part
        whole = part.new_empty(len(self._padded))
        whole[self.part] = part
        return self.processes.gather(whole)[: len(self)]

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes up the moments of a checkpoint."""
        self.moments.step.copy_(state["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            of_part = state[name][self.part]
            getattr(self.moments, name)[: len(of_part)].copy_(of_part)


class WeightAverage:
    """Exponential moving averages of the parameters in vectors: theta~ := d theta~ + (1 - d) theta after each step.

    d is min(decay, (1 + t) / (10 + t)) after t steps, as in TensorFlow's ExponentialMovingAverage with num_updates: the
    start is soon forgotten. state: theta~ (P,) of each vector by its name, and t, (); changed in place.
    """

    def __init__(self, vectors: Mapping[str, FlatParameters], decay: float) -> None:
        self.values = {name: vector.values for name, vector in vectors.items() if len(vector)}
        self.averages = {name: values.clone() for name, values in self.values.items()}
        self.decay, self.step = decay, next(iter(self.values.values())).new_zeros(())
        self.state = {**self.averages, "step": self.step}

    @torch.no_grad()
    def after_step(self, is_skipped: Tensor) -> None:
        """is_skipped: (), 1 for a step that was left out; nothing moves then. All on the device, nothing waits."""
        self.step += 1 - is_skipped
        weight = (9 / (10 + self.step)).clamp(min=1 - self.decay) * (1 - is_skipped)  # 1 - d
        for name, values in self.values.items():
            self.averages[name].lerp_(values, weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the parameters are their averages; after it they are what they were, to the bit."""
        before = {name: values.clone() for name, values in self.values.items()}
        try:
            for name, values in self.values.items():
                values.copy_(self.averages[name])
            yield
        finally:
            for name, values in self.values.items():
                values.copy_(before[name])


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, (), float64 on their device; infinite or NaN where one of them is."""
    norms = torch.stack([_norm(gradient.flatten()).double() for gradient in gradients])
    if norms.device.type == "cpu" and not torch.isfinite(norms).all():  # float32 ends at 1e19
        norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients])
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


def _norm(vector: Tensor) -> Tensor:
    """Of a long vector by pieces: twice as fast on a CPU, and one sum in float32 is not as long."""
    whole = len(vector) // PIECE * PIECE
    pieces = torch.linalg.vector_norm(vector[:whole].view(-1, PIECE), dim=1)
    return torch.linalg.vector_norm(torch.cat([pieces, torch.linalg.vector_norm(vector[whole:])[None]]))  # type: ignore[no-any-return]


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by so that it is at most max_norm, both (); 0 for no limit."""
    if max_norm == 0:
        return torch.ones_like(norm)
    factor: Tensor = max_norm / (norm + 1e-6)
    return factor.clamp(max=1.0)
