"""On a CUDA GPU: each operation against its torch form in float64 on the CPU, and whole runs. Where there is none, all
of it is skipped; what can be shown without one (which rows a step sees, what it waits for) is in the other files."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import engine
import multitask_classifier
import ops
from benchmarks import workload
from evaluation import Precision
from helpers import generator, tiny_config, tiny_model
from ops import DropoutMasks, Linear, Packing, Replayed
from ops.adamw import Moments, Vector, adamw_by_definition
from run_record import MetricsLog

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CUDA = torch.device("cuda", 0)
LENGTHS = [5, 130, 60, 1, 17, 16, 2, 33, 59, 1, 12, 15]
HALF = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed + sum(shape)))


def assert_same_function(
    ours: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """In value and in all gradients. ours gets the inputs on the GPU, exact in float64 on the CPU."""
    of_ours = [x.detach().clone().to(CUDA, dtype).requires_grad_() for x in inputs]
    of_exact = [x.detach().to(dtype).double().requires_grad_() for x in inputs]
    found, expected = ours(*of_ours), exact(*of_exact)
    weights = random(*expected.shape, seed=9).to(dtype)
    found.backward(weights.to(found))
    expected.backward(weights.double())
    pairs = [(found, expected), *((x.grad, y.grad) for x, y in zip(of_ours, of_exact, strict=True))]
    for one, other in pairs:
        assert one is not None and other is not None
        assert float((one.detach().cpu().double() - other.detach()).norm()) < HALF[dtype] * float(other.detach().norm())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("num_heads", "size"), [(1, 5), (2, 16), (3, 17), (2, 64)])
@pytest.mark.parametrize("first_only", [False, True])
def test_attention_is_its_formula(dtype: torch.dtype, num_heads: int, size: int, first_only: bool) -> None:
    """Tokens that belong to no row too: they get something finite."""
    width, total = num_heads * size, sum(LENGTHS)
    here, there = Packing.of(LENGTHS), Packing(torch.tensor(LENGTHS).cumsum(0).to(CUDA), 130)

    def apply(packing: Packing, tensors: Sequence[Tensor]) -> Tensor:
        if first_only:
            return ops.first_token_attention(*tensors, packing, num_heads, 0.0, None)
        return ops.attention(*tensors, packing, num_heads, 0.0, None)[:total]

    inputs = [random(len(LENGTHS), width), random(total, 2 * width)] if first_only else [random(total, 3 * width)]
    assert_same_function(lambda *given: apply(there, given), lambda *given: apply(here, given), inputs, dtype)
    more = random(total + 50, 3 * width).to(CUDA, dtype).requires_grad_()
    context = ops.attention(more, there, num_heads, 0.3, DropoutMasks(1, CUDA))
    context[:total].float().sum().backward()
    assert more.grad is not None and context.isfinite().all() and not more.grad[total:].any()


@pytest.mark.parametrize("first_only", [False, True])
def test_attention_drops_probabilities_at_the_rate_and_the_same_ones_in_its_backward_pass(first_only: bool) -> None:
    """With all keys alike and values that tell their number apart, the context shows which keys were kept."""
    lengths, prob = [7, 40, 64], 0.25
    packing, total = Packing(torch.tensor(lengths).cumsum(0).to(CUDA), 64), sum(lengths)
    value = F.one_hot(torch.cat([torch.arange(n) for n in lengths]), 64).float()  # (N, 64)
    zeros = torch.zeros(total, 64)
    query = torch.zeros(3, 64) if first_only else zeros
    tensors = [query, torch.cat([zeros, value], 1)] if first_only else [torch.cat([zeros, zeros, value], 1)]
    on_gpu = [tensor.to(CUDA).requires_grad_() for tensor in tensors]
    operation = ops.first_token_attention if first_only else ops.attention
    context = operation(*on_gpu, packing, 1, prob, DropoutMasks(5, CUDA))  # type: ignore[operator]
    per_query = torch.tensor(lengths) if first_only else torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))
    mask = context.detach().cpu() * per_query[:, None]  # (queries, 64): 0 or 1 / (1 - prob) at each key's place
    is_key = torch.arange(64) < per_query[:, None]
    assert {round(value, 3) for value in mask[is_key].tolist()} == {0.0, 1.333}
    if not first_only:
        assert abs(float((mask[is_key] > 0).float().mean()) - 0.75) < 0.02
    weights = random(*context.shape)
    (gradient,) = torch.autograd.grad((context * weights.to(CUDA)).sum(), on_gpu[-1])
    again = operation(*on_gpu, packing, 1, prob, DropoutMasks(5, CUDA))  # type: ignore[operator]
    other = operation(*on_gpu, packing, 1, prob, DropoutMasks(6, CUDA))  # type: ignore[operator]
    assert torch.equal(again, context) and not torch.equal(other, context)
    with pytest.raises(AssertionError, match="other masks"):
        torch.autograd.grad(again.sum(), on_gpu[-1])
    rows = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    of_queries = torch.arange(3) if first_only else rows
    place = value.argmax(1)
    shares = torch.where(of_queries[None] == rows[:, None], mask.T[place] / per_query, 0)  # (N keys, queries)
    torch.testing.assert_close(gradient[:, -64:].cpu(), shares @ weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_dropout_keeps_the_same_elements_in_its_backward_pass_and_again(dtype: torch.dtype) -> None:
    values = (random(70, 33).abs() + 0.5).to(CUDA, dtype).requires_grad_()
    masks = DropoutMasks(4, CUDA)
    first, second = ops.dropout(values, 0.25, masks), ops.dropout(values, 0.25, masks)
    kept = first.detach() > 0
    assert abs(float(kept.float().mean()) - 0.75) < 0.03 and not torch.equal(kept, second > 0)
    expected = torch.where(kept, values / 0.75, 0)
    torch.testing.assert_close(first, expected, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=0.0)
    (gradient,) = torch.autograd.grad(first.sum(), values)
    assert torch.equal(gradient > 0, kept)
    assert torch.equal(ops.dropout(values, 0.25, masks.again()), first)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("has_term", [False, True])
@pytest.mark.parametrize("prob", [0.0, 0.3])
def test_linear_residual_norm_is_its_formula(dtype: torch.dtype, has_term: bool, prob: float) -> None:
    norm, layer = nn.LayerNorm(48, eps=1e-3), Linear(24, 48)
    mask = torch.ones(65, 48)
    if prob:  # of ones, where nothing else is: the sign after the norm tells what was kept
        plain = nn.LayerNorm(48).to(CUDA)
        ones, nothing = Linear(1, 48).to(CUDA), torch.zeros(65, 48, device=CUDA)
        nn.init.ones_(ones.weight), nn.init.zeros_(ones.bias)
        kept = ops.linear_residual_norm(nothing[:, :1] + 1, ones, nothing, plain, prob, DropoutMasks(3, CUDA))
        mask = (kept > 0).cpu() / (1 - round(prob * 2**16) / 2**16)
        assert abs(float((mask > 0).float().mean()) - 0.7) < 0.03

    def with_parameters(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Linear, nn.LayerNorm]:
        layer._parameters.update(weight=weight, bias=bias)  # type: ignore[call-overload]
        norm._parameters.update(weight=scale, bias=shift)  # type: ignore[call-overload]
        return layer, norm

    def ours(x: Tensor, residual: Tensor, *given: Tensor) -> Tensor:
        parameters, term = given[:4], given[4] if has_term else None
        own, normed = with_parameters(*(parameter.float() for parameter in parameters))
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return ops.linear_residual_norm(x, own, residual, normed, prob, DropoutMasks(3, CUDA), term)

    def exact(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, *term: Tensor
    ) -> Tensor:
        sums = residual + mask.double() * (x @ weight.T + bias) + (term[0] if term else 0)
        return F.layer_norm(sums, (48,), scale, shift, 1e-3)

    inputs = [random(65, 24), random(65, 48), random(48, 24), random(48), random(48) + 1, random(48, seed=1)]
    assert_same_function(ours, exact, [*inputs, *([random(65, 48, seed=4)] if has_term else [])], dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", ["gelu", "relu", ""])
@pytest.mark.parametrize("rows", [1, 70, 4000])
def test_layers_and_activations_are_torchs(dtype: torch.dtype, activation: str, rows: int) -> None:
    layer = Linear(24, 40)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        layer._parameters.update(weight=weight.float(), bias=bias.float())  # type: ignore[call-overload]
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return ops.activated_linear(x, layer, activation) if activation else layer(x)

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output = F.linear(x, weight, bias)
        return {"gelu": F.gelu, "relu": F.relu}.get(activation, lambda y: y)(output)

    assert_same_function(ours, exact, [random(rows, 24), random(40, 24), random(40)], dtype)


def test_gradients_are_added_to_what_is_there_unless_a_parameter_is_held_still() -> None:
    dense, layer, norm = Linear(32, 32).to(CUDA), Linear(32, 32).to(CUDA), nn.LayerNorm(32).to(CUDA)
    parameters = [*dense.parameters(), *layer.parameters(), *norm.parameters()]
    x = random(50, 32).to(CUDA).requires_grad_()

    def loss() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            hidden = ops.activated_linear(x, dense, "gelu")
            return ops.linear_residual_norm(hidden, layer, x, norm, 0.0, None).float().square().sum()

    fresh = torch.autograd.grad(loss(), parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    loss().backward()
    for parameter, gradient in zip(parameters, fresh, strict=True):
        torch.testing.assert_close(parameter.grad, 1 + gradient, rtol=1e-4, atol=1e-3)
    before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.requires_grad_(False)
    found = loss()
    for parameter in parameters:
        parameter.requires_grad_(True)
    torch.autograd.grad(found, x)
    assert all(torch.equal(p.grad, was) for p, was in zip(parameters, before, strict=True) if p.grad is not None)


def test_row_means_are_the_same_bits_every_time_and_in_a_graph() -> None:
    total = sum(LENGTHS)
    ends = torch.tensor(LENGTHS).cumsum(0)
    here, there = Packing.of(LENGTHS), Packing(ends.to(CUDA), 130)
    for dtype in HALF:
        inputs = [random(total + 5, 48)]
        assert_same_function(lambda x: ops.row_means(x, there), lambda x: ops.row_means(x, here), inputs, dtype)
    states, weights = random(total + 5, 48).to(CUDA).requires_grad_(), random(len(LENGTHS), 48).to(CUDA)

    def means_and_gradient(key: int, ends: Tensor) -> Tensor:
        means = ops.row_means(states, Packing(ends, 130))
        (gradient,) = torch.autograd.grad(means, states, weights)
        return torch.cat([means, gradient])

    replayed, others = Replayed(means_and_gradient), torch.tensor(LENGTHS[::-1]).cumsum(0)
    for of in (ends, ends, ends, others, ends):  # from the second on a graph
        assert torch.equal(replayed(0, of.to(CUDA)), means_and_gradient(0, of.to(CUDA)))


@pytest.mark.parametrize("size", [1, 100, 70_000])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5])
def test_inner_products_and_weighted_sums(size: int, num_tasks: int) -> None:
    whole = random(num_tasks, size + 7)
    rows, exact = whole.to(CUDA)[:, 3 : size + 3], whole[:, 3 : size + 3].double()
    torch.testing.assert_close(ops.gramian(rows).cpu(), exact @ exact.T, rtol=1e-5, atol=1e-5 * size)
    weights = torch.linspace(-1, 2, num_tasks, dtype=torch.float64)
    others = rows[1:].clone()
    ops.weighted_sum(rows, weights)
    torch.testing.assert_close(rows[0].cpu().double(), weights @ exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows[1:], others)


def test_adamw_is_its_definition_and_leaves_a_skipped_step_out() -> None:
    ours, decay = random(5000).to(CUDA), torch.tensor([0.3] * 3000 + [0.0] * 2000)
    theirs, moments = ours.cpu().double(), Moments.zeros_like(ours)
    exact = Moments.zeros_like(theirs)
    factor = torch.tensor(0.25, device=CUDA)
    for step in range(5):
        gradient, lr = random(5000, seed=step) * 10.0 ** (step - 2), 1e-2 * (step + 1)
        vector = Vector(ours, gradient.clone().to(CUDA), moments, 3000)
        ops.adamw_step([vector], torch.tensor(lr, device=CUDA, dtype=torch.float64), 0.3, factor, 0 * factor)
        adamw_by_definition(theirs, gradient.double(), exact, lr, decay, 0.25)
        torch.testing.assert_close(ours.cpu(), theirs.float(), rtol=1e-5, atol=5e-6)
    before = [ours.clone(), moments.exp_avg.clone(), moments.step.clone()]
    vector = Vector(ours, torch.full_like(ours, torch.nan), moments, 3000)
    ops.adamw_step([vector], factor, 0.3, factor, torch.ones_like(factor))
    assert all(torch.equal(x, y) for x, y in zip(before, (ours, moments.exp_avg, moments.step), strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_one_pass_over_all_tasks_rows_gives_the_gradient_of_each(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, cuda_graphs: bool
) -> None:
    """The gradients that a treatment gets, step by step, are those of a pass for each task."""
    lengths = {"sst": np.arange(3, 40), "para": np.arange(5, 60), "sts": np.array([6, 9])}
    rows = workload.random_rows(lengths, 50, tiny_config(), CUDA)
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    for is_joined, gradients in found.items():
        monkeypatch.setattr(engine, "has_fused_operations", lambda device, answer=is_joined: answer)
        monkeypatch.setattr(engine, "combine", lambda of_step, *rest, into=gradients: into.append(of_step.clone()))
        model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(CUDA)
        options = {"draws_per_step": 3, "treatment": "pcgrad", "rows_per_step": 20, "cuda_graphs": cuda_graphs}
        trainer = workload.full_trainer(model, rows, precision=Precision(CUDA, dtype), **options)
        assert (trainer._joined is not None) == is_joined
        for step in range(12):
            trainer.take_step(1, step)
    for one, other in zip(*found.values(), strict=True):
        distance, norm = (one - other).norm(dim=1), other.norm(dim=1)  # (T,)
        assert (norm > 0).all() and (distance < (1e-4 if dtype is None else 3e-2) * norm).all()


# ------------------------------------------------------------------------------------------------------ whole runs

SETTINGS = [
    "", "--pcgrad", "--gradvac", "--pcgrad --granularity layer", "--smart", "--bregman", "--smart --bregman --pcgrad",
    "--pal", "--pal --pcgrad --pal_kind low_rank", "--pal --train pal", "--scheduler random --draws_per_step 4",
    "--scheduler round_robin", "--scheduler temperature", "--head mlp", "--amp bf16", "--amp fp16 --pcgrad",
    "--amp fp16 --bregman", "--amp bf16 --pcgrad --smart", "--no-cuda_graphs --amp bf16", "--accumulation_steps 3",
    "--pooling mean --pairs siamese", "--pooling cls --amp bf16", "--pooling mean --pairs siamese --amp fp16 --pcgrad",
    "--pooling mean --pairs siamese --smart --pal", "--pooling mean --pcgrad", "--average ema",
    "--average ema --pal --train pal", "--rdrop", "--rdrop --smart --bregman --pcgrad --amp bf16",
    "--copy_top_layers 1 --amp bf16",
    "--head lstm", "--head lstm sst=linear --amp bf16 --pcgrad --pairs siamese", "--head routing --amp bf16 --pcgrad",
]  # fmt: skip


@pytest.fixture
def command(tiny: Path, data: Path) -> Callable[[Path, str], list[str]]:
    def arguments(out: Path, flags: str) -> list[str]:
        shared = "--device cuda --epochs 2 --pretrain_epochs 1 --batch_size 8 --cache off --no-tensorboard"
        return [*shared.split(), "--model", str(tiny), "--data", str(data), "--out", str(out), *flags.split()]

    return arguments


@pytest.mark.parametrize("flags", SETTINGS)
def test_every_setting_runs(command: Callable[[Path, str], list[str]], flags: str, tmp_path: Path) -> None:
    assert multitask_classifier.main(command(tmp_path / "run", f"{flags} --steps_per_epoch 3")) == 0


def killed_at(line: int, arguments: list[str]) -> None:
    """The command, killed when its log is about to get its nth line."""
    original, count = MetricsLog.write, 0

    def write(self: MetricsLog, record: Any) -> None:
        nonlocal count
        count += 1
        if count == line:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, record)

    MetricsLog.write = write  # type: ignore[method-assign]
    multitask_classifier.main(arguments)


@pytest.mark.parametrize(
    "flags",
    [
        "--amp bf16 --average ema",
        "--amp fp16 --pcgrad --copy_top_layers 1",
        "--gradvac --smart --bregman --pal",
        "--pooling mean --pairs siamese",
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    command: Callable[[Path, str], list[str]], flags: str, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    flags = f"{flags} --steps_per_epoch 12 --save_every 5 --lr 1e-3"
    assert multitask_classifier.main(command(whole, flags)) == 0
    process = multiprocessing.get_context("spawn").Process(target=killed_at, args=(25, command(out, flags)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert multitask_classifier.main(["--resume", str(out)]) == 0
    for name in ("best/model.safetensors", "last/model.safetensors", "last/trainer.safetensors"):
        expected, found = load_file(whole / name), load_file(out / name)
        assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    assert np.array_equal(
        (whole / "metrics.jsonl").read_text().count("\n"), (out / "metrics.jsonl").read_text().count("\n")
    )
