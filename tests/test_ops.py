"""The kernels against the same formulas in float64, and what becomes of a machine that cannot compile them."""

import copy
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import kernels
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernels import AttentionRows, DropoutBits
from torch import Tensor, nn

from bert import AttentionLayout, DropoutMasks, PackedTokens
from helpers import RecordedMasks, generator, tiny_encoder, tiny_model
from pal import PalConfig

PROJECT = Path(kernels.__file__).resolve().parent
needs_kernels = pytest.mark.skipif(kernels.build().library is None, reason=f"no kernels: {kernels.build().problem}")
LENGTHS = [5, 60, 1, 17, 16, 2, 33, 59, 1, 12, 15, 130]


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator(seed + sum(shape))) * scale


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """In units of the largest expected number."""
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


# ----------------------------------------------------------------------------------------------------------- GELU


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (7, 16), (130, 50), (65, 96), (2, 1000)])
def test_gelu_is_torchs_of_the_sum_with_the_bias(shape: tuple[int, int], threads: int) -> None:
    inputs = [random(*shape, scale=3), random(shape[1])]
    assert_same_function(kernels.bias_gelu, lambda x, b: F.gelu(x + b), inputs)


@needs_kernels
def test_gelu_is_exact_far_out_and_around_zero() -> None:
    values = torch.cat([torch.linspace(-30, 30, 100_001), torch.linspace(-1e-3, 1e-3, 1001), torch.tensor([0.0])])[None]
    found = kernels.bias_gelu(values, torch.zeros(values.shape[1]))
    expected = F.gelu(values.double())
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=2e-7)
    tail = (values < -1) & (values > -5)
    torch.testing.assert_close(found[tail].double(), values[tail].double() * _tail(values[tail]), rtol=2e-6, atol=0)


def _tail(values: Tensor) -> Tensor:
    """The normal distribution function of negative numbers, by the complementary error function."""
    return torch.special.erfc(-values.double() / 2**0.5) / 2


@needs_kernels
def test_what_is_not_a_number_stays_so_and_infinities_keep_their_sign() -> None:
    found = kernels.bias_gelu(torch.tensor([[torch.nan, torch.inf, 1.0]]), torch.zeros(3))
    assert found[0, 0].isnan() and found[0, 1] == torch.inf and found[0, 2].isfinite()
    norm = nn.LayerNorm(20)
    update = random(3, 20)
    update[1, 4] = torch.nan
    found = kernels.residual_norm(update, torch.zeros(20), random(3, 20), None, None, norm)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
    for wrong in (torch.nan, torch.inf):
        qkv = random(9, 3 * 8)
        qkv[5, 10] = wrong  # a key of the second row
        context = kernels.self_attention(qkv, None, AttentionLayout([4, 5]).rows(2, False), 2, None)
        assert context[:4].isfinite().all() and context[4:, :4].isnan().any()
    payload = random(4, 3 * 8)
    payload.view(torch.int32)[2, 9] = 0x7FC00001  # another of the numbers that are none
    assert kernels.self_attention(payload, None, AttentionLayout([4]).rows(2, False), 2, None).isnan().any()


@needs_kernels
@pytest.mark.parametrize("lengths", [[6, 5], [5, 6], [16, 1], [4, 3, 2]])
def test_what_is_not_a_number_stays_in_its_row(lengths: list[int]) -> None:
    """In the backward pass too, though the rows' work shares its memory."""
    rows = AttentionLayout(lengths).rows(1, False)
    qkv = random(sum(lengths), 3 * 8)
    qkv[: lengths[0]] = torch.nan
    qkv.requires_grad_()
    context = kernels.self_attention(qkv, None, rows, 1, None)
    (gradient,) = torch.autograd.grad((context * random(*context.shape)).sum(), qkv)
    assert context[lengths[0] :].isfinite().all() and gradient[lengths[0] :].isfinite().all()
    assert gradient[: lengths[0]].isnan().any()


@needs_kernels
def test_scores_far_below_zero_count_as_any_others() -> None:
    for scale in (1.0, 1e16):
        qkv = torch.zeros(2, 3)
        qkv[:, 0], qkv[:, 1], qkv[:, 2] = scale, -100 * scale, torch.tensor([4.0, 6.0])
        rows = AttentionLayout([2]).rows(1, False)
        assert kernels.self_attention(qkv, None, rows, 1, None).flatten().tolist() == [5.0, 5.0]


@needs_kernels
def test_inputs_and_gradients_may_lie_in_memory_in_any_way() -> None:
    def strided(*shape: int) -> Tensor:
        return random(*shape[:-1], 2 * shape[-1])[..., ::2]

    norm = nn.LayerNorm(24)
    norm.weight = nn.Parameter(random(24, 2)[:, 0])
    rows = AttentionLayout(np.array([3, 9, 5, 9])[::2])
    update, residual, term, offset = strided(8, 24), strided(8, 24), random(24, 8).T, random(1).expand(24)
    functions = [
        (lambda x: kernels.bias_gelu(x, offset), lambda x: F.gelu(x + offset), update),
        (
            lambda x: kernels.residual_norm(x, offset, residual, term, None, norm),
            lambda x: norm(x + offset + residual + term),
            update,
        ),
        (
            lambda x: kernels.self_attention(x, None, rows.rows(2, False), 2, None),
            lambda x: exact_attention(*x.chunk(3, 1), rows.rows(2, False), 2, None),
            strided(8, 24),
        ),
        (
            lambda x: kernels.cross_attention(x[:2, :8], x[:, 8:], rows.rows(2, True), 2, None),
            lambda x: exact_attention(x[:2, :8], *x[:, 8:].chunk(2, 1), rows.rows(2, True), 2, None),
            update,
        ),
    ]
    for ours, theirs, values in functions:
        x, y = values.clone().requires_grad_(), values.clone().requires_grad_()
        torch.testing.assert_close(ours(values), theirs(values), rtol=1e-5, atol=1e-5)
        for expand in (lambda of: of.sum(), lambda of: (of.T * torch.arange(len(of))).sum()):
            found, expected = (torch.autograd.grad(expand(f(z)), z)[0] for f, z in ((ours, x), (theirs, y)))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_a_copied_layout_outlives_the_first_one() -> None:
    qkv, layout = random(12, 24), AttentionLayout([3, 9])
    expected = kernels.self_attention(qkv, None, layout.rows(2, False), 2, None)
    copied = copy.deepcopy(layout)
    del layout
    gc.collect()
    noise = [np.full(2, 10**6) for _ in range(1000)]
    assert torch.equal(kernels.self_attention(qkv, None, copied.rows(2, False), 2, None), expected) and noise


# -------------------------------------------------------------------------------------------------- residual norm


@needs_kernels
@pytest.mark.parametrize("has_term", [False, True])
@pytest.mark.parametrize("prob", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 5), (3, 21), (130, 48), (33, 384)])
def test_residual_norm_is_layer_norm_of_the_sum(
    shape: tuple[int, int], prob: float, has_term: bool, threads: int
) -> None:
    bits = DropoutMasks(3).bits(shape[0] * shape[1], prob) if prob else None
    mask = torch.ones(shape) if bits is None else bits.mask(shape, torch.float32)
    assert prob == 0 or 0 < int((mask == 0).sum()) < mask.numel()
    inputs = [random(*shape), random(shape[1]), random(*shape, seed=1), random(shape[1], seed=2) + 1]
    inputs += [random(shape[1], seed=3), *([random(*shape, seed=4)] if has_term else [])]

    def ours(
        update: Tensor, offset: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, term: Tensor | None = None
    ) -> Tensor:
        norm = nn.LayerNorm(shape[1], eps=1e-3)
        norm._parameters.update(weight=weight, bias=bias)  # type: ignore[arg-type]
        return kernels.residual_norm(update, offset, residual, term, bits, norm)

    def exact(
        update: Tensor, offset: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, term: Tensor | None = None
    ) -> Tensor:
        sums = residual + mask.double() * (update + offset)
        sums = sums if term is None else sums + term
        normalized = (sums - sums.mean(1, keepdim=True)) / (sums.var(1, keepdim=True, correction=0) + 1e-3).sqrt()
        return normalized * weight + bias

    assert_same_function(ours, exact, inputs, 5e-6)


# ------------------------------------------------------------------------------------------------------ attention


def exact_attention(
    queries: Tensor, keys: Tensor, values: Tensor, rows: AttentionRows, num_heads: int, bits: DropoutBits | None
) -> Tensor:
    """The formula, head by head: queries (M, D), keys and values (N, D); lines of no row are zero."""
    size = keys.shape[1] // num_heads
    context = torch.zeros_like(queries)
    for r in range(len(rows.starts)):
        first, count = int(rows.query_starts[r]), int(rows.num_queries[r])
        start, length = int(rows.starts[r]), int(rows.lengths[r])
        for head in range(num_heads):
            columns = slice(head * size, (head + 1) * size)
            q, k, v = (
                of[a : a + n, columns]
                for of, a, n in ((queries, first, count), (keys, start, length), (values, start, length))
            )
            probs = torch.softmax(q @ k.T / size**0.5, -1)
            if bits is not None:
                places = rows.bits_starts[r] + (head * rows.bits_queries[r] + np.arange(count)) * rows.bits_strides[r]
                words = bits.words[torch.from_numpy(places[:, None] + np.arange(length))]
                probs = probs * (words >= bits.threshold) * bits.keep
            context = context.index_put(
                (torch.arange(first, first + count)[:, None], torch.arange(columns.start, columns.stop)), probs @ v
            )
    return context


@needs_kernels
@pytest.mark.parametrize("prob", [0.0, 0.25])
@pytest.mark.parametrize(("num_heads", "size"), [(1, 5), (2, 16), (4, 8), (3, 17), (2, 40)])
@pytest.mark.parametrize("unused", [0, 3])
def test_self_attention_is_its_formula(num_heads: int, size: int, prob: float, unused: int, threads: int) -> None:
    """Also with lines behind the last row, which come out as zeros."""
    layout, width = AttentionLayout(LENGTHS), num_heads * size
    rows = layout.rows(num_heads, first_only=False)
    bits = DropoutMasks(1).bits(layout.num_scores(num_heads), prob) if prob else None
    inputs = [random(sum(LENGTHS) + unused, 3 * width), random(3 * width, seed=1)]

    def exact(qkv: Tensor, bias: Tensor) -> Tensor:
        return exact_attention(*(qkv + bias).chunk(3, 1), rows, num_heads, bits)

    assert_same_function(lambda qkv, bias: kernels.self_attention(qkv, bias, rows, num_heads, bits), exact, inputs)
    found = kernels.self_attention(inputs[0], None, rows, num_heads, bits)
    assert_near(found, exact(inputs[0].double(), torch.zeros(3 * width)))
    assert not found[sum(LENGTHS) :].any()


@needs_kernels
@pytest.mark.parametrize("prob", [0.0, 0.25])
@pytest.mark.parametrize(("num_heads", "size"), [(1, 5), (4, 8), (2, 40)])
def test_attention_of_first_tokens_is_its_formula(num_heads: int, size: int, prob: float, threads: int) -> None:
    layout, width = AttentionLayout(LENGTHS), num_heads * size
    rows = layout.rows(num_heads, first_only=True)
    bits = DropoutMasks(1).bits(layout.num_scores(num_heads, first_only=True), prob) if prob else None
    inputs = [random(len(LENGTHS), width), random(sum(LENGTHS) + 2, 2 * width)]
    assert_same_function(
        lambda q, kv: kernels.cross_attention(q, kv, rows, num_heads, bits),
        lambda q, kv: exact_attention(q, *kv.chunk(2, 1), rows, num_heads, bits),
        inputs,
    )


@needs_kernels
def test_scores_far_apart_do_not_overflow() -> None:
    qkv = random(40, 3 * 8, scale=100)
    rows = AttentionLayout([17, 23]).rows(2, False)
    found = kernels.self_attention(qkv, None, rows, 2, None)
    assert_near(found, exact_attention(*qkv.double().chunk(3, 1), rows, 2, None), 1e-4)


@pytest.mark.parametrize("first_only", [False, True])
def test_every_score_has_random_bits_of_its_own(first_only: bool) -> None:
    layout, num_heads = AttentionLayout(LENGTHS), 3
    rows = layout.rows(num_heads, first_only)
    places = [
        rows.bits_starts[r] + (head * rows.bits_queries[r] + query) * rows.bits_strides[r] + key
        for r in range(len(LENGTHS))
        for head in range(num_heads)
        for query in range(rows.num_queries[r])
        for key in range(rows.lengths[r])
    ]
    assert len(set(places)) == len(places) and max(places) < layout.num_scores(num_heads, first_only)


# ---------------------------------------------------------------------------------- the encoder with and without


@needs_kernels
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"hidden_size": 21, "num_attention_heads": 3}, {"hidden_act": "gelu_new"}])
def test_the_encoder_is_the_same_without_kernels_dropout_included(
    overrides: dict[str, int], adapters: bool, first_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [min(length, 60) for length in LENGTHS]
    tokens = PackedTokens.from_rows([[1] * n for n in lengths], [[0] * n for n in lengths])
    found = []
    for use in (True, False):
        if not use:
            monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
        model = tiny_model(
            adapters=PalConfig("attention", 8, 2, 2) if adapters else None,
            hidden_dropout_prob=0.3,
            attention_probs_dropout_prob=0.15,
            **overrides,
        )
        masks = RecordedMasks(4)
        for up in model.adapters.parameters():
            nn.init.normal_(up, std=0.2, generator=generator(6))
        output = model.encoder(tokens, masks, model.adapter("sst"), first_only=first_only)
        (output * random(*output.shape)).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((output.detach(), masks.drawn, gradients))
    (ours, drawn, gradients), (theirs, drawn_again, expected) = found
    assert len(drawn) > 5
    assert all(p == q and torch.equal(one, other) for (p, one), (q, other) in zip(drawn, drawn_again, strict=True))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert gradients.keys() == expected.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=2e-5, msg=name)


@needs_kernels
def test_results_do_not_depend_on_the_number_of_threads_but_for_sums_over_rows(threads: int) -> None:
    encoder, tokens = tiny_encoder(), PackedTokens.from_rows([[1] * 9, [2] * 4], [[0] * 9, [0] * 4])
    found = encoder(tokens, DropoutMasks(1))
    torch.set_num_threads(1)
    assert torch.equal(found, encoder(tokens, DropoutMasks(1)))


# -------------------------------------------------------------------------------------------------------- dropout


def split_mix(key: int, first: int, count: int) -> list[int]:
    """SplitMix64 as its paper writes it, one number after the other."""
    numbers, state, full = [], key, 2**64 - 1
    for _ in range(first + count):
        state = state + 0x9E3779B97F4A7C15 & full
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & full
        z = (z ^ z >> 27) * 0x94D049BB133111EB & full
        numbers.append(z ^ z >> 31)
    return numbers[first:]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("key", "first", "count"), [(0, 0, 5), (1234567, 3, 1000), (2**64 - 1, 7, 9)])
def test_random_words_are_split_mix(
    key: int, first: int, count: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "build", lambda: kernels.Build(None, "for this test"))
    elif kernels.build().library is None:
        pytest.skip(f"no kernels: {kernels.build().problem}")
    assert kernels.random_words(key, first, count).tolist() == split_mix(key, first, count)


def test_the_first_numbers_of_split_mix_are_those_that_others_publish() -> None:
    assert split_mix(1234567, 0, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_draw_has_the_words_that_attention_may_read_beyond_it() -> None:
    (lanes,) = re.findall(r"^#define LANES (\d+)", kernels.SOURCE.read_text(), re.MULTILINE)
    assert int(lanes) == kernels.SLACK
    for numel in (0, 1, 15, 1000):
        assert len(DropoutMasks(0).bits(numel, 0.5).words) >= numel + kernels.SLACK


def test_probabilities_next_to_one_and_the_largest_seed_are_possible() -> None:
    assert not DropoutMasks(2**64 - 1).draw((1000,), 0.999999, torch.float32).isinf().any()


# ------------------------------------------------------------------------------------------- gradients, optimizer


@needs_kernels
@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 63, 100_001])
def test_inner_products_sums_and_norms_are_those_of_float64(num_rows: int, size: int, threads: int) -> None:
    buffer = random(num_rows, size + 7)
    rows = buffer[:, 3 : size + 3]
    exact = rows.double()
    products = kernels.block_gramians(rows, 1000)
    assert products.shape == (-(-size // 1000), num_rows, num_rows)
    torch.testing.assert_close(products.sum(0), exact @ exact.T, rtol=1e-6, atol=1e-6 * size)
    assert kernels.squared_norm(rows[0]) == pytest.approx(float(exact[0].square().sum()), rel=1e-12)
    weights = [0.5, -2.0, 3.0, 0.0, 1.25][:num_rows]
    before = buffer.clone()
    kernels.weighted_sum_in_first(list(rows), weights)
    assert_near(rows[0], torch.tensor(weights, dtype=torch.float64) @ exact)
    assert torch.equal(buffer[1:], before[1:]) and torch.equal(buffer[0, :3], before[0, :3])
    assert torch.equal(buffer[0, size + 3 :], before[0, size + 3 :])


@needs_kernels
@pytest.mark.parametrize("with_states", [False, True])
def test_adamw_is_its_formula(with_states: bool, threads: int) -> None:
    shape = (50, 21)
    parameter, gradient, mean, square = (random(*shape, seed=i) for i in range(4))
    square.square_()
    states = torch.arange(50, dtype=torch.uint8) % 3 if with_states else None
    if states is not None:
        gradient[states < 2] = 0
        mean[states == 0] = 0
        square[states == 0] = 0
    p, g, m, v = (of.double() for of in (parameter, gradient, mean, square))
    kernels.adamw(
        parameter, gradient, mean, square, states,
        factor=0.7, decay=0.99, betas=(0.9, 0.999), step_size=1e-2, root_correction=0.3, epsilon=1e-3,
    )  # fmt: skip
    m = 0.9 * m + 0.1 * 0.7 * g
    v = 0.999 * v + 0.001 * (0.7 * g) ** 2
    assert_near(mean, m, 5e-7)
    assert_near(square, v, 5e-7)
    assert_near(parameter, 0.99 * p - 1e-2 * m / (v.sqrt() / 0.3 + 1e-3), 5e-7)


# ---------------------------------------------------------------------------------------------------------- build


def outcome(tmp_path: Path, **environment: str) -> list[str]:
    """What a new process says of its kernels: whether it has them, and the problem."""
    script = "import kernels; b = kernels.build(); print(b.library is not None); print(b.problem)"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_kernels
def test_kernels_are_compiled_once_and_kept(tmp_path: Path) -> None:
    assert outcome(tmp_path, CC="gcc") == ["True", ""]
    (made,) = (tmp_path / "cache" / "multitask-bert").iterdir()
    before = made.stat()
    assert outcome(tmp_path, CC="gcc") == ["True", ""]
    assert made.stat().st_mtime_ns == before.st_mtime_ns and len(list(made.parent.iterdir())) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are made for Linux")
def test_without_a_compiler_that_works_there_are_none_and_the_reason_is_said(tmp_path: Path) -> None:
    assert outcome(tmp_path, CC="no-such-compiler") == ["False", "no C compiler: no-such-compiler was not found"]
    assert outcome(tmp_path, CC="false") == ["False", "false failed: no message"]
    assert list((tmp_path / "cache" / "multitask-bert").iterdir()) == []
    (tmp_path / "file").touch()
    found = outcome(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert found[0] == "False" and "file" in found[1]
    assert outcome(tmp_path, CC='gcc "') == ["False", "No closing quotation"]


@needs_kernels
def test_a_damaged_library_is_made_again(tmp_path: Path) -> None:
    outcome(tmp_path)
    (made,) = (tmp_path / "cache" / "multitask-bert").iterdir()
    made.write_bytes(made.read_bytes()[:100])
    assert outcome(tmp_path) == ["True", ""]


@needs_kernels
def test_another_processor_compiler_or_source_is_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [kernels._path()]
    monkeypatch.setattr(kernels, "_processor", lambda: "flags: none")
    paths.append(kernels._path())
    monkeypatch.setenv("CC", "gcc -g")
    paths.append(kernels._path())
    (tmp_path / "kernels.c").write_text(kernels.SOURCE.read_text() + "\n")
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "kernels.c")
    paths.append(kernels._path())
    assert len(set(paths)) == 4


@needs_kernels
def test_the_openmp_library_is_torchs_also_where_its_path_has_a_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [
        "7f00-7f01 r-xp 00000000 08:01 17                         /usr/lib/libgomp.so.1.0.0",
        "7f02-7f03 r-xp 00000000 08:01 18                         /home/a b/torch/lib/libgomp-24e.so.1",
        "7f04-7f05 r-xp 00000000 08:01 19                         /home/a b/torch/lib/libtorch.so",
    ]
    monkeypatch.setattr(Path, "read_text", lambda path: "\n".join(lines))
    assert kernels._openmp() == "/home/a b/torch/lib/libgomp-24e.so.1"
    lines.clear()
    with pytest.raises(kernels.BuildError, match="no OpenMP"):
        kernels._openmp()


def test_other_types_and_autocast_are_left_to_torch() -> None:
    assert kernels.usable(torch.zeros(2)) == (kernels.build().library is not None)
    assert not kernels.usable(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not kernels.usable(torch.zeros(2, dtype=torch.bfloat16))
    assert not kernels.usable(torch.zeros(2, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.usable(torch.zeros(2))
