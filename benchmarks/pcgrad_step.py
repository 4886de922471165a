"""A PCGrad step over three tasks: ours against plain passes, and against other libraries on the same encoder and rows.

    python -m benchmarks.pcgrad_step [--data DIR] [--rounds N] [--threads N]

Every step sees 32 rows of each task. The plain step is a forward and a backward pass for each task and one optimizer
step. torchjd's PCGrad runs in each of the ways that its documentation offers: `backward` over the losses, with and
without its saving of memory, and `mtl_backward`; on our encoder they differentiate one loss at a time, as its own vmap
does not pass through our attention. LibMTL's PCGrad is measured where that package is installed. All optimizers are
torch's fused AdamW, so that the gradients alone are compared.

The wrapper around an optimizer that most PyTorch code has copied keeps a flat clone of each task's gradient and
projects in the full P-dimensional space: T x T passes over memory instead of the two of the Gram matrix. It is only
described here, neither copied nor measured.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import workload
from benchmarks.harness import Benchmark, Check, Line, Options, Report, Step, Summary, alternate, ratios, run
from benchmarks.reference import PaddedBert, pad
from bert import DropoutMasks
from datasets import TokenizedRows
from model import MultitaskBert
from pcgrad import TaskGradients, pcgrad_weights
from tasks import TASKS, task_loss

PLAIN, OURS = "plain passes", "ours"
BACKWARD, SAVING, MTL = "torchjd backward", "torchjd backward, memory saving", "torchjd mtl_backward"
PADDED, LIBMTL = "torchjd backward, transformers padded", "LibMTL"
AT_MOST = 1.10


class OurLosses:
    """A loss for each task of a step, by our encoder. parameters: shared, then each task's own."""

    def __init__(self, model: MultitaskBert, rows: Mapping[str, TokenizedRows], dropout: bool = True) -> None:
        self.model, self.rows, self.dropout = model, rows, dropout
        self.shared = list(model.shared_parameters().values())
        self.of_tasks = [list(model.task_parameters(task).values()) for task in rows]

    def __call__(self, draws: Sequence[workload.Draw], step: int) -> tuple[list[Tensor], list[Tensor]]:
        """The losses, and the pooled features that they follow from."""
        losses, features = [], []
        for number, (task, numbers) in enumerate(draws):
            batch = self.rows[task].batch(numbers)
            masks = DropoutMasks(1000 * step + number) if self.dropout else None
            features.append(self.model.pooled(task, batch, masks))
            losses.append(task_loss(TASKS[task], self.model.predict(task, features[-1], masks), batch.labels))
        return losses, features


class PaddedLosses:
    """The same by transformers' encoder on padded batches."""

    def __init__(self, model: PaddedBert, rows: Mapping[str, TokenizedRows]) -> None:
        self.model, self.rows = model.train(), rows
        self.shared = list(model.encoder.parameters())
        self.of_tasks = [list(model.heads[task].parameters()) for task in rows]

    def __call__(self, draws: Sequence[workload.Draw], step: int) -> tuple[list[Tensor], list[Tensor]]:
        losses, features = [], []
        for task, numbers in draws:
            batch = pad(self.rows[task], numbers)
            features.append(self.model.pooled(batch))
            losses.append(task_loss(TASKS[task], self.model.predict(task, features[-1]), batch.labels))
        return losses, features


Losses = OurLosses | PaddedLosses
Differentiate = Callable[[Losses, list[Tensor], list[Tensor]], None]  # losses, features -> every parameter's gradient


def torchjd_backward(saving: bool) -> Differentiate:
    """torchjd's Jacobian of all losses. saving: its option that saves memory."""
    from torchjd.aggregation import PCGrad, Sum
    from torchjd.autojac import backward, jac_to_grad

    def differentiate(of: Losses, losses: list[Tensor], features: list[Tensor]) -> None:
        own = [parameter for parameters in of.of_tasks for parameter in parameters]
        backward(losses, inputs=[*of.shared, *own], parallel_chunk_size=1)
        jac_to_grad(own, Sum())
        jac_to_grad(of.shared, PCGrad(), optimize_gramian_computation=saving)

    return differentiate


def torchjd_mtl_backward() -> Differentiate:
    """torchjd's way for shared features and heads."""
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    def differentiate(of: Losses, losses: list[Tensor], features: list[Tensor]) -> None:
        mtl_backward(
            losses, features=features, tasks_params=of.of_tasks, shared_params=of.shared, parallel_chunk_size=1
        )
        jac_to_grad(of.shared, PCGrad())

    return differentiate


def libmtl_backward(of_step: Losses) -> Differentiate:
    """LibMTL's PCGrad, with what its architectures give it. Raises ImportError where it is not installed."""
    treatment: Any = _libmtl_weighting().PCGrad()
    treatment.task_num, treatment.device, treatment.rep_grad = len(of_step.of_tasks), torch.device("cpu"), False
    treatment.get_share_params = lambda: of_step.shared

    def zero() -> None:  # in place: LibMTL writes its result into the gradients that are there
        for parameter in of_step.shared:
            if parameter.grad is not None:
                parameter.grad.zero_()

    treatment.zero_grad_share_params = zero
    return lambda of, losses, features: treatment.backward(losses)


def _libmtl_weighting() -> Any:
    """LibMTL's gradient treatments without its image models, which would need torchvision."""
    spec = importlib.util.find_spec("LibMTL")
    if spec is None:
        raise ImportError("LibMTL is not installed")
    sys.modules.setdefault("LibMTL", importlib.util.module_from_spec(spec))
    return importlib.import_module("LibMTL.weighting")


class Setup:
    """The checkpoint, the rows, and what each step sees of them."""

    def __init__(self, options: Options) -> None:
        self.checkpoint = workload.Checkpoint.find(options.model)
        self.rows = self.checkpoint.rows(options.data, "train")
        self.draws = workload.Draws(self.rows, len(self.rows))

    def model(self) -> MultitaskBert:
        return self.checkpoint.model(tuple(self.rows))

    def ours(self, treatment: str) -> Step:
        trainer = workload.full_trainer(self.model(), self.rows, draws_per_step=len(self.rows), treatment=treatment)
        return lambda step: trainer.take_step(1, step)

    def padded(self) -> PaddedLosses:
        return PaddedLosses(PaddedBert.from_checkpoint(self.checkpoint.folder, self.model()), self.rows)

    def by(self, of: Losses, differentiate: Differentiate) -> Step:
        """A step with another library's treatment."""
        parameters: list[nn.Parameter] = [*of.shared, *(p for own in of.of_tasks for p in own)]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01, fused=True)

        def take_step(step: int) -> None:
            optimizer.zero_grad()
            losses, features = of(self.draws(step), step)
            differentiate(of, losses, features)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        return take_step

    def libmtl(self) -> Step:
        of = OurLosses(self.model(), self.rows)
        return self.by(of, libmtl_backward(of))

    def makers(self) -> dict[str, Callable[[], Step]]:
        """By name, what makes a step."""
        makers = {
            PLAIN: lambda: self.ours("sum"),
            OURS: lambda: self.ours("pcgrad"),
            BACKWARD: lambda: self.by(OurLosses(self.model(), self.rows), torchjd_backward(False)),
            SAVING: lambda: self.by(OurLosses(self.model(), self.rows), torchjd_backward(True)),
            MTL: lambda: self.by(OurLosses(self.model(), self.rows), torchjd_mtl_backward()),
            PADDED: lambda: self.by(self.padded(), torchjd_backward(False)),
        }
        return {**makers, LIBMTL: self.libmtl} if importlib.util.find_spec("LibMTL") else makers

    def difference_from_torchjd(self, sign: float) -> float:
        """Of the shared gradient from torchjd's, in its norm: same rows and orders, no dropout.

        sign: factor on the first task's loss; with -1 tasks that agree are in conflict.
        """
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import backward, jac_to_grad

        of = OurLosses(self.model(), self.rows, dropout=False)
        signs = [sign] + [1.0] * (len(self.rows) - 1)

        def losses() -> list[Tensor]:
            return [factor * loss for factor, loss in zip(signs, of(self.draws(0), 0)[0], strict=True)]

        torch.manual_seed(workload.SEED)
        backward(losses(), inputs=of.shared, parallel_chunk_size=1)
        jac_to_grad(of.shared, PCGrad())
        expected = flat_gradient(of.shared)
        torch.manual_seed(workload.SEED)
        found = self._gradient(of, losses())
        return float((found - expected).norm() / expected.norm())

    def _gradient(self, of: OurLosses, losses: Sequence[Tensor]) -> Tensor:
        """Ours, with the orders that torchjd would draw from torch's generator."""
        gradients = TaskGradients(of.shared, len(losses), [len(of.shared)])
        for row, loss in enumerate(losses):
            gradients.point_to(row)
            loss.backward()
        tasks = range(len(losses))
        orders = [[j for j in torch.randperm(len(losses)).tolist() if j != i] for i in tasks]
        gradients.combine(tasks, pcgrad_weights(gradients.gramians(tasks)[0], orders)[None])
        return flat_gradient(of.shared)


def flat_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    """(P,) float64."""
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double()


def variants(options: Options) -> Mapping[str, Callable[[], Step]]:
    return Setup(options).makers()


def measure(options: Options) -> Report:
    setup = Setup(options)
    differences = {sign: setup.difference_from_torchjd(sign) for sign in (1.0, -1.0)}
    makers = setup.makers()
    seconds = alternate({name: make() for name, make in makers.items()}, options.rounds)
    compared = {name: Summary.of(ratios(of, seconds[PLAIN])) for name, of in seconds.items()}
    memory = {name: BENCHMARK.memory(name, options) for name in makers}
    lines = [
        Line(name, of, ratio=None if name == PLAIN else compared[name], memory=memory[name])
        for name, of in seconds.items()
    ]
    same = "difference of the shared gradient from torchjd's, same orders"
    checks = [
        Check("a PCGrad step over the plain passes", compared[OURS].median, AT_MOST),
        Check(same, differences[1.0], 1e-5, must_hold=True),
        Check(f"{same}, the first loss negated", differences[-1.0], 1e-5, must_hold=True),
    ]
    over_torchjd = {name: Summary.of(ratios(seconds[name], seconds[OURS])).median for name in (BACKWARD, SAVING, MTL)}
    faster = min(over_torchjd[BACKWARD], over_torchjd[MTL])
    checks.append(Check("a PCGrad step over torchjd's, the faster of backward and mtl_backward", 1 / faster, 1 / 2.5))
    times = ", ".join(f"{name} {of:.2f}" for name, of in over_torchjd.items())
    notes = [f"times as long as ours on the same encoder, the median of the rounds: {times}"]
    if LIBMTL not in makers:
        notes.append("LibMTL is not installed: not measured (pip install --no-deps LibMTL)")
    settings = {"rounds": options.rounds, "batch_size": workload.BATCH_SIZE, "rows": workload.row_counts(setup.rows)}
    return Report("seconds of a step over three tasks, 32 rows each; ratios to plain", lines, checks, notes, settings)


BENCHMARK = Benchmark("pcgrad_step", measure, variants, rounds=10)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(BENCHMARK, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
