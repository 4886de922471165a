"""Parameters, their gradients, AdamW's moments and averages of the parameters in vectors of one layout.

Every parameter becomes a view into one vector, and its `grad` a view into another, so that autograd accumulates
straight into it and the optimizer is one pass over memory. For gradient treatments there is a gradient vector for each
task.

Shape letters: P parameters, T tasks.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ops import Moments, Vector

PIECE = 2**14


class FlatParameters:
    """Some parameters in one vector: first the matrices, which weight decay applies to, then biases and LayerNorms.

    values: (P,). gradients: (num_gradients, P), in which `point_to` chooses what backward passes accumulate into.
    """

    @torch.no_grad()
    def __init__(self, parameters: Mapping[str, nn.Parameter], num_gradients: int = 1) -> None:
        matrices = [name for name, parameter in parameters.items() if parameter.dim() > 1]
        self.names = [*matrices, *(name for name in parameters if name not in set(matrices))]
        self._parameters = [parameters[name] for name in self.names]
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self.num_decayed = sum(self._sizes[: len(matrices)])
        flat = [parameter.detach().flatten() for parameter in self._parameters]
        self.values = torch.cat(flat) if flat else torch.empty(0)
        self.gradients = self.values.new_zeros(num_gradients, len(self.values))
        self.moments = Moments.zeros_like(self.values)
        for parameter, value in zip(self._parameters, self._views(self.values), strict=True):
            parameter.data = value
        self._gradient_views = [self._views(gradient) for gradient in self.gradients]
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
        """Where the parameters of these names stand in the vectors: as few ranges as there are."""
        ranges: list[list[int]] = []
        first = 0
        for name, size in zip(self.names, self._sizes, strict=True):
            if name in names and ranges and ranges[-1][1] == first:
                ranges[-1][1] += size
            elif name in names:
                ranges.append([first, first + size])
            first += size
        return [slice(*bounds) for bounds in ranges]

    def moved_by(self, gradient: Tensor) -> Vector:
        """What an AdamW step along gradient, (P,), moves."""
        return Vector(self.values, gradient, self.moments, self.num_decayed)

    def state(self) -> dict[str, Tensor]:
        """The moments, for a checkpoint; they themselves, not copies."""
        return dict(vars(self.moments))


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
