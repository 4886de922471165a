"""Each operation, in its torch form and compiled, against its formula in float64; dropout, and packing."""

import copy
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from helpers import RecordedMasks, generator, pack, random_tokens, randomize_vectors, tiny_encoder
from ops import DropoutMasks, Linear, Packing, kernels
from ops.dropout import SLACK
from ops.packed import group_by_length
from ops.residual_norm import residual_norm

LINEAR: Any = importlib.import_module("ops.linear")  # the module: `ops.linear` is its function
PROJECT = kernels.SOURCE.parent.parent
LENGTHS = [5, 130, 60, 1, 17, 16, 2, 33, 59, 1, 12, 15]
needs_kernels = pytest.mark.skipif(kernels.build().library is None, reason=f"no kernels: {kernels.build().problem}")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")


@pytest.fixture(params=["torch", *(pytest.param(threads, marks=needs_kernels) for threads in (1, 3))])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The torch form of an operation, and the kernels with some numbers of threads."""
    before = torch.get_num_threads()
    if request.param == "torch":
        monkeypatch.setattr(kernels, "can_run", lambda *tensors: False)
    else:
        torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[pytest.param("onednn", marks=needs_onednn), "torch"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either library of matrix products, whichever is the faster one here."""
    monkeypatch.setattr(LINEAR, "_onednn_is_faster", lambda: request.param == "onednn")


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator(seed + sum(shape))) * scale


def assert_near(found: Tensor | None, expected: Tensor | None, tolerance: float = 2e-6) -> None:
    """In units of the largest expected number, which is in float64."""
    assert found is not None and expected is not None
    assert found.dtype == torch.float32 and expected.dtype == torch.float64 and found.shape == expected.shape
    scale = max(float(expected.abs().max()), 1e-30)
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=tolerance)


def assert_same_function(
    ours: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: Sequence[Tensor], tolerance: float = 2e-6
) -> None:
    """In value and in all gradients; exact gets the same inputs in float64."""
    of_ours = [x.clone().requires_grad_() for x in inputs]
    of_exact = [x.double().requires_grad_() for x in inputs]
    found, expected = ours(*of_ours), exact(*of_exact)
    assert_near(found.detach(), expected.detach(), tolerance)
    weights = random(*expected.shape, seed=9)
    found_gradients = torch.autograd.grad((found * weights).sum(), of_ours)
    gradients = torch.autograd.grad((expected * weights.double()).sum(), of_exact)
    for one, other in zip(found_gradients, gradients, strict=True):
        assert_near(one, other, tolerance)


# -------------------------------------------------------------------------------------------------- dense layers


def layer(inputs: int, outputs: int) -> Linear:
    made = Linear(inputs, outputs)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(random(*parameter.shape))
    return made


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 8, 24), (7, 24, 8), (130, 48, 16), (130, 16, 48)])
def test_linear_is_torchs(product: None, rows: int, inputs: int, outputs: int, has_bias: bool) -> None:
    tensors = [random(rows, inputs), random(outputs, inputs), *([random(outputs)] if has_bias else [])]
    assert_same_function(lambda x, w, b=None: ops.linear(x, w, b), lambda x, w, b=None: F.linear(x, w, b), tensors)


def test_gradients_are_added_to_views_of_a_vector(product: None) -> None:
    """Those of a part of the matrix too."""
    ours, x = layer(16, 48), random(20, 16)

    def loss() -> Tensor:
        return ours(x).square().sum() + ops.linear(x, ours.weight[:3], None).square().sum()  # type: ignore[no-any-return]

    once = torch.autograd.grad(loss(), list(ours.parameters()))
    vector = torch.ones(16 * 48 + 48)
    ours.weight.grad, ours.bias.grad = vector[: 16 * 48].view(48, 16), vector[16 * 48 :]
    loss().backward()
    torch.testing.assert_close(vector, 1 + torch.cat([g.flatten() for g in once]))


def test_a_frozen_layer_gets_no_gradient_and_passes_one_on(product: None) -> None:
    ours, x = layer(16, 8).requires_grad_(False), random(4, 16).requires_grad_()
    ours(x).sum().backward()
    assert ours.weight.grad is None and ours.bias.grad is None
    assert_near(x.grad, ours.weight.double().sum(0).expand(4, -1))


@needs_onednn
def test_no_rows_three_dimensions_other_types_and_autocast_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LINEAR, "onednn_product", lambda *_, **__: pytest.fail("oneDNN was used"))
    monkeypatch.setattr(LINEAR, "_onednn_is_faster", lambda: True)
    ours = layer(16, 8)
    with pytest.raises(pytest.fail.Exception, match="oneDNN was used"):
        ours(random(4, 16))
    assert ours(random(0, 16)).shape == (0, 8)
    assert ours(random(2, 3, 16)).shape == (2, 3, 8)
    assert layer(16, 8).double()(random(4, 16).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(random(4, 16)).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert ours(random(4, 16)).shape == (4, 8)


@needs_onednn
@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_onednn_is_the_faster_one_with_avx512_unless_the_processor_is_intels(
    vendor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id : {vendor}\n")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for capability in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        is_faster = LINEAR._onednn_is_faster.__wrapped__()
        assert is_faster == (vendor == "AuthenticAMD" and capability == "AVX512")


# --------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_a_layer_with_its_activation_is_torchs(form: None, product: None, name: str, with_gradient: bool) -> None:
    theirs = {"gelu_new": nn.GELU("tanh"), "gelu_pytorch_tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "gelu": nn.GELU()}
    ours, x = layer(24, 40), random(50, 24)
    exact = copy.deepcopy(ours).double()
    with torch.set_grad_enabled(with_gradient):
        found = ops.activated_linear(x, ours, name)
    assert found.requires_grad == with_gradient
    assert_near(found.detach(), theirs.get(name, nn.SiLU())(F.linear(x.double(), exact.weight, exact.bias)).detach())


@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (7, 16), (130, 50), (2, 3000)])
def test_gelu_is_torchs_in_value_and_gradient(form: None, shape: tuple[int, int]) -> None:
    identity = nn.Identity()
    assert_same_function(
        lambda x: ops.activated_linear(x, identity, "gelu"),  # type: ignore[arg-type]
        F.gelu,
        [random(*shape, scale=3)],
    )


@needs_kernels
def test_gelu_is_exact_far_out_and_around_zero() -> None:
    values = torch.cat([torch.linspace(-30, 30, 100_001), torch.linspace(-1e-3, 1e-3, 1001), torch.zeros(1)])[None]
    found = ops.activated_linear(values.requires_grad_(), nn.Identity(), "gelu").detach()  # type: ignore[arg-type]
    values = values.detach()
    torch.testing.assert_close(found.double(), F.gelu(values.double()), rtol=3e-7, atol=2e-7)
    tail = values[(values < -1) & (values > -5)].double()
    expected = tail * torch.special.erfc(-tail / 2**0.5) / 2
    torch.testing.assert_close(found[(values < -1) & (values > -5)].double(), expected, rtol=2e-6, atol=0)


# -------------------------------------------------------------------------------------------------- residual norm


@pytest.mark.parametrize("has_term", [False, True])
@pytest.mark.parametrize("prob", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 5), (3, 21), (130, 48), (33, 384)])
def test_residual_norm_is_layer_norm_of_the_sum(
    form: None, shape: tuple[int, int], prob: float, has_term: bool
) -> None:
    norm, masks = nn.LayerNorm(shape[1], eps=1e-3), RecordedMasks(3)
    inputs = [random(*shape), random(*shape, seed=1), random(shape[1], seed=2) + 1, random(shape[1], seed=3)]
    inputs += [random(*shape, seed=4)] if has_term else []

    def ours(update: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, term: Tensor | None = None) -> Tensor:
        norm._parameters.update(weight=weight, bias=bias)  # type: ignore[call-overload]
        return residual_norm(update, residual, norm, prob, masks, term)

    def exact(update: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, term: Tensor | float = 0) -> Tensor:
        mask = masks.drawn[0][1].view(shape).double() if prob else 1
        sums = residual + mask * update + term
        normalized = (sums - sums.mean(1, keepdim=True)) / (sums.var(1, keepdim=True, correction=0) + 1e-3).sqrt()
        return normalized * weight + bias

    assert_same_function(ours, exact, inputs, 5e-6)
    assert len(masks.drawn) == (prob > 0)
    evaluated = residual_norm(inputs[0], inputs[1], nn.LayerNorm(shape[1]), prob, None, None)
    assert_near(evaluated.detach(), F.layer_norm((inputs[0] + inputs[1]).double(), shape[1:]), 5e-6)


# ------------------------------------------------------------------------------------------------------ attention


def exact_attention(
    tensors: Sequence[Tensor], lengths: Sequence[int], num_heads: int, mask: Tensor | None, reach: int = 1000
) -> Tensor:
    """The formula, head by head. tensors: queries (N, D), or (B, D) of the first tokens; keys and values (N, D).

    reach: a token sees those at most so many places away.
    mask: flat, of blocks (rows, H, queries, L) of the groups of rows, longest first. Tokens of no row stay zero.
    """
    queries, keys, values = tensors
    size, first_only = keys.shape[1] // num_heads, len(queries) == len(lengths)
    context, place = torch.zeros_like(queries), 0
    for rows in group_by_length(np.array(lengths)):
        longest = max(lengths[r] for r in rows)
        for r in rows:
            start, end = sum(lengths[:r]), sum(lengths[: r + 1])
            lines = slice(r, r + 1) if first_only else slice(start, end)
            for head in range(num_heads):
                columns = slice(head * size, (head + 1) * size)
                q, k, v = queries[lines, columns], keys[start:end, columns], values[start:end, columns]
                scores = q @ k.T / size**0.5
                scores += torch.full_like(scores, -torch.inf).tril(-reach - 1)
                scores += torch.full_like(scores, -torch.inf).triu(reach + 1)
                probs = torch.softmax(scores, -1)
                if mask is not None:
                    block = mask[place:][: (1 if first_only else longest) * longest].view(-1, longest)
                    probs = probs * block[: len(q), : end - start]
                    place += block.numel()
                context[lines, columns] = probs @ v
    assert mask is None or place == len(mask)
    return context


@pytest.mark.parametrize("prob", [0.0, 0.25])
@pytest.mark.parametrize(("num_heads", "size"), [(1, 5), (2, 16), (3, 17), (2, 40)])
def test_attention_is_its_formula(form: None, num_heads: int, size: int, prob: float) -> None:
    """Also with a token that belongs to no row, which comes out as zeros."""
    packing, masks = Packing.of(LENGTHS), RecordedMasks(1)
    qkv = random(sum(LENGTHS) + 1, 3 * num_heads * size)

    def exact(qkv: Tensor) -> Tensor:
        mask = masks.drawn[0][1].double() if prob else None
        return exact_attention(qkv.chunk(3, 1), LENGTHS, num_heads, mask)

    assert_same_function(lambda qkv: ops.attention(qkv, packing, num_heads, prob, masks), exact, [qkv])
    assert len(masks.drawn) == (prob > 0)
    evaluated = ops.attention(qkv, packing, num_heads, prob, None)
    assert_near(evaluated, exact_attention(qkv.double().chunk(3, 1), LENGTHS, num_heads, None))
    assert not evaluated[sum(LENGTHS) :].any()


@pytest.mark.parametrize("reach", [0, 4, 128, 129])
def test_attention_in_a_window_is_its_formula(form: None, reach: int) -> None:
    packing, masks, qkv = Packing.of(LENGTHS), RecordedMasks(1), random(sum(LENGTHS) + 1, 3 * 24)

    def exact(qkv: Tensor) -> Tensor:
        return exact_attention(qkv.chunk(3, 1), LENGTHS, 3, masks.drawn[0][1].double(), reach)

    assert_same_function(lambda qkv: ops.attention(qkv, packing, 3, 0.25, masks, reach), exact, [qkv])


def test_rotated_queries_and_keys_are_complex_numbers_times_powers(form: None) -> None:
    packing, qkv = Packing.of(LENGTHS), random(sum(LENGTHS), 3 * 3 * 8)

    def exact(qkv: Tensor) -> Tensor:
        parts = list(qkv.view(-1, 3, 3, 2, 4).unbind(1))  # query, key and value, (N, H, 2, E / 2)
        place = torch.cat([torch.arange(length) for length in LENGTHS])
        turns = torch.exp(1j * torch.outer(place, 50.0 ** (-torch.arange(4.0, dtype=torch.float64) / 4)))[:, None]
        for i in range(2):
            points = torch.complex(parts[i][:, :, 0], parts[i][:, :, 1]) * turns
            parts[i] = torch.stack([points.real, points.imag], 2)
        return torch.stack(parts, 1).flatten(1)

    assert_same_function(lambda qkv: ops.rotated(qkv, packing, 3, 50.0), exact, [qkv], 1e-5)


@pytest.mark.parametrize("is_backwards", [False, True])
def test_a_block_holds_each_row_from_its_first_or_its_last_token_on(is_backwards: bool) -> None:
    states, lengths = random(10, 3).requires_grad_(), [4, 1, 3]  # two tokens belong to no row
    block, is_token = ops.padded(states, Packing.of(lengths), is_backwards)
    assert block.shape == (3, 4, 3) and is_token.sum(1).tolist() == lengths
    for row, part, length in zip(states[:8].split(lengths), block, lengths, strict=True):
        assert torch.equal(part[:length], row.flip(0) if is_backwards else row)
    block[is_token].sum().backward()
    assert states.grad is not None and states.grad[:8].eq(1).all() and not states.grad[8:].any()


@pytest.mark.parametrize("prob", [0.0, 0.25])
@pytest.mark.parametrize(("num_heads", "size"), [(1, 5), (4, 8), (2, 40)])
def test_attention_of_first_tokens_is_its_formula(form: None, num_heads: int, size: int, prob: float) -> None:
    packing, masks, width = Packing.of(LENGTHS), RecordedMasks(1), num_heads * size

    def exact(query: Tensor, key_value: Tensor) -> Tensor:
        mask = masks.drawn[0][1].double() if prob else None
        return exact_attention((query, *key_value.chunk(2, 1)), LENGTHS, num_heads, mask)

    assert_same_function(
        lambda query, key_value: ops.first_token_attention(query, key_value, packing, num_heads, prob, masks),
        exact,
        [random(len(LENGTHS), width), random(sum(LENGTHS) + 1, 2 * width)],
    )


def test_scores_far_apart_or_far_below_zero_count_as_any_others(form: None) -> None:
    qkv = random(40, 3 * 8, scale=100)
    found = ops.attention(qkv, Packing.of([17, 23]), 2, 0.0, None)
    assert_near(found, exact_attention(qkv.double().chunk(3, 1), [17, 23], 2, None), 1e-4)
    for scale in (1.0, 2.0**53):
        qkv = torch.tensor([[scale, -100 * scale, 4.0], [scale, -100 * scale, 6.0]], requires_grad=True)
        context = ops.attention(qkv, Packing.of([2]), 1, 0.0, None)
        assert context.flatten().tolist() == [5.0, 5.0]
        (gradient,) = torch.autograd.grad(context.sum(), qkv)
        assert gradient.tolist() == [[0.0, -scale, 1.0], [0.0, scale, 1.0]]


# ------------------------------------------------------------------------------------- what all operations share


@needs_kernels
def test_every_operation_goes_to_its_kernel_where_kernels_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    original = kernels.call

    def call(name: str, *arguments: object) -> None:
        called.append(name)
        original(name, *arguments)

    monkeypatch.setattr(kernels, "call", call)
    packing, x = Packing.of([3, 5]), random(8, 24).requires_grad_()

    def run() -> None:
        called.clear()
        ops.attention(x, packing, 2, 0.0, None).sum().backward()
        ops.first_token_attention(x[:2], x.repeat(1, 2), packing, 2, 0.0, None).sum().backward()
        residual_norm(x, x, nn.LayerNorm(24), 0.0, None, None).sum().backward()
        ops.activated_linear(x, layer(24, 16), "gelu").sum().backward()

    run()
    names = ["attention", "attention", "residual_norm", "gelu"]
    assert called == [f"{name}_{way}" for name in names for way in ("forward", "backward")]
    with torch.autocast("cpu", torch.bfloat16):
        run()
    assert called == []


@needs_kernels
@pytest.mark.parametrize("finish", [lambda out: out.T, lambda out: out.sum(0)], ids=["transposed", "expanded"])
def test_inputs_and_gradients_may_lie_in_memory_in_any_way(finish: Callable[[Tensor], Tensor]) -> None:
    """An operation in float64 is its torch form."""
    packing, norm, dense = Packing.of([3, 5]), nn.LayerNorm(24), layer(24, 8)
    randomize_vectors(norm, 5)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x + 1], -1)[..., 0]

    def normed(x: Tensor) -> Tensor:
        own = copy.deepcopy(norm).to(x.dtype)
        own.weight = nn.Parameter(strided(own.weight.detach()))
        return residual_norm(strided(x), strided(2 * x), own, 0.0, None, strided(x.square()))

    operations: list[Callable[[Tensor], Tensor]] = [
        normed,
        lambda x: ops.attention(strided(x), packing, 2, 0.0, None),
        lambda x: ops.first_token_attention(strided(x[:2, :8]), strided(x[:, 8:]), packing, 2, 0.0, None),
        lambda x: ops.activated_linear(strided(x), copy.deepcopy(dense).to(x.dtype), "gelu"),
    ]
    for operation in operations:

        def finished(x: Tensor, operation: Callable[[Tensor], Tensor] = operation) -> Tensor:
            return finish(operation(x))

        assert_same_function(finished, finished, [random(8, 24)], 1e-5)


def test_what_is_not_a_number_stays_so_in_its_row_and_nowhere_else(form: None) -> None:
    """In backward passes too, though rows share the memory that kernels work in."""
    values = torch.tensor([[torch.nan, torch.inf, 1.0]], requires_grad=True)
    found = ops.activated_linear(values, nn.Identity(), "gelu")  # type: ignore[arg-type]
    assert found.isfinite().tolist() == [[False, False, True]]
    update = random(3, 20).index_put_((torch.tensor(1), torch.tensor(4)), torch.tensor(torch.nan))
    found = residual_norm(update, random(3, 20), nn.LayerNorm(20), 0.0, None, None)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
    for wrong in (torch.nan, torch.inf):
        qkv = random(9, 3 * 8)
        qkv[5, 10] = wrong  # a key of the second row, in the first of two heads
        context = ops.attention(qkv, Packing.of([4, 5]), 2, 0.0, None)
        assert context[:4].isfinite().all() and context[4:, :4].isnan().any()
    for lengths in ([6, 5], [5, 6], [16, 1], [4, 3, 2]):
        qkv = random(sum(lengths), 3 * 8)
        qkv[: lengths[0]] = torch.nan
        context = ops.attention(qkv.requires_grad_(), Packing.of(lengths), 1, 0.0, None)
        (gradient,) = torch.autograd.grad((context * random(*context.shape)).sum(), qkv)
        assert context[lengths[0] :].isfinite().all() and gradient[lengths[0] :].isfinite().all()
        assert gradient[: lengths[0]].isnan().any()


def test_values_do_not_depend_on_the_number_of_threads(form: None) -> None:
    encoder, tokens = tiny_encoder(), random_tokens(5)
    found = encoder(tokens, DropoutMasks(1))
    torch.set_num_threads(1)
    assert torch.equal(found, encoder(tokens, DropoutMasks(1)))


# -------------------------------------------------------------------------------------------------------- lookup


def test_a_lookup_adds_its_gradient_to_the_one_that_is_there(form: None) -> None:
    ids = torch.randint(0, 30, (500,), generator=generator())  # most lines many times, into the same memory
    factor, vector = random(500, 24), random(40 * 24)
    weight, dense = nn.Parameter(random(40, 24)), nn.Parameter(random(40, 24))
    weight.grad = vector.view(40, 24)
    expected = vector.view(40, 24).clone().double()
    found = ops.embedding(ids, weight)
    assert torch.equal(found, weight[ids])
    (rows,) = torch.autograd.grad(found.sum(), [weight], retain_graph=True)
    assert rows.is_sparse and rows._nnz() == len(ids)  # instead of a matrix of the whole vocabulary
    (found * factor).sum().backward()
    assert_near(vector.view(40, 24), expected.index_add(0, ids, factor.double()))
    (ops.embedding(ids, dense) * factor).sum().backward()  # there is none yet
    assert_near(dense.grad, torch.zeros(40, 24).double().index_add(0, ids, factor.double()))
    assert not dense.grad.is_sparse  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("prob", [0.05, 0.1, 0.5, 0.9])
def test_a_mask_drops_its_share_and_keeps_the_mean(prob: float) -> None:
    mask = DropoutMasks(7).mask((1001, 1001), prob)
    share = (mask == 0).double().mean().item()
    assert share == pytest.approx(prob, abs=5 * (prob * (1 - prob) / mask.numel()) ** 0.5 + 2**-17)
    torch.testing.assert_close(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / (1 - prob)), rtol=2e-4, atol=0)
    assert mask.double().mean().item() == pytest.approx(1, abs=5 * (prob / (1 - prob) / mask.numel()) ** 0.5)


def test_the_elements_of_a_mask_are_independent_of_their_neighbours() -> None:
    dropped = (DropoutMasks(8).mask((2**20,), 0.3) == 0).double() - 0.3
    for shift in (1, 2, 3, 4, 64):
        correlation = (dropped[shift:] * dropped[:-shift]).mean().item() / 0.21
        assert abs(correlation) < 5 / 2**10


def test_masks_repeat_by_seed_and_again_repeats_them_from_the_first() -> None:
    masks = DropoutMasks(11)
    first = [masks.mask((50,), 0.5) for _ in range(3)]
    again, same_seed, other_seed = masks.again(), DropoutMasks(11), DropoutMasks(12)
    for mask in first:
        assert torch.equal(again.mask((50,), 0.5), mask) and torch.equal(same_seed.mask((50,), 0.5), mask)
        assert not torch.equal(other_seed.mask((50,), 0.5), mask)
    assert not torch.equal(first[0], first[1])


def test_masks_have_the_dtype_asked_for_any_size_any_seed_and_probabilities_next_to_one() -> None:
    for size in (0, 1, 5, 127):
        mask = DropoutMasks(2**64 - 1).mask((size,), 0.5, torch.bfloat16)
        assert mask.shape == (size,) and mask.dtype == torch.bfloat16 and set(mask.tolist()) <= {0.0, 2.0}
    assert not DropoutMasks(0).mask((1000,), 0.999999).isinf().any()


def test_dropout_multiplies_by_its_mask_and_does_nothing_without_masks() -> None:
    x = random(9, 7)
    assert torch.equal(ops.dropout(x, 0.5, DropoutMasks(3)), x * DropoutMasks(3).mask((9, 7), 0.5))
    assert torch.equal(ops.dropout(x, 0.5, None), x)


def test_a_draw_has_the_words_that_attention_may_read_beyond_it() -> None:
    lanes = re.findall(r"^#define LANES (\d+)", kernels.SOURCE.read_text(), re.MULTILINE)
    assert max(map(int, lanes)) == SLACK
    assert all(len(DropoutMasks(0).bits(numel, 0.5).words) >= numel + SLACK for numel in (0, 1, 15, 1000))


# ------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize(("multiple", "unowned"), [(1, 0), (4, 2), (32, 26)])
def test_positions_count_from_zero_in_every_row(multiple: int, unowned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last row stand zeros, up to a multiple."""
    monkeypatch.setattr(ops.packed, "rows_multiple", lambda *_: multiple)
    tokens = pack([[5, 6, 7], [8], [9, 9]], [[0, 0, 1], [0], [0, 1]])
    rest = [0] * unowned
    assert tokens.input_ids.tolist() == [5, 6, 7, 8, 9, 9, *rest]
    assert tokens.position_ids.tolist() == [0, 1, 2, 0, 0, 1, *rest]
    assert tokens.token_type_ids.tolist() == [0, 0, 1, 0, 0, 1, *rest]
    assert tokens.row_of_token.tolist() == [0, 0, 0, 1, 2, 2, *[3] * unowned]
    assert tokens.first_tokens.tolist() == [0, 3, 4]
    assert len(tokens) == 3 and tokens.num_tokens == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_row_means_are_the_mean_of_each_row_and_of_nothing_else(dtype: torch.dtype) -> None:
    """In value and gradient; what stands behind the last row is not even looked at."""
    total = sum(LENGTHS)
    states = random(total + 9, 24).to(dtype)
    states[total:] = torch.nan
    states.requires_grad_()
    exact = states.detach()[:total].double().requires_grad_()
    found, expected = ops.row_means(states, Packing.of(LENGTHS)), torch.stack([r.mean(0) for r in exact.split(LENGTHS)])
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    weights = random(len(LENGTHS), 24)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert states.grad is not None and exact.grad is not None and not states.grad[total:].any()
    torch.testing.assert_close(states.grad[:total], exact.grad.to(dtype))


def test_groups_hold_every_row_once_and_waste_at_most_a_quarter() -> None:
    lengths = np.random.default_rng(0).integers(1, 61, 200)
    groups = list(group_by_length(lengths))
    assert sorted(np.concatenate(groups).tolist()) == list(range(200))
    assert all(lengths[rows].min() >= 0.75 * lengths[rows].max() for rows in groups)
    assert len(groups) < 25
