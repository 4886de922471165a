"""oneDNN's products against torch's own, in float64 where rounding must not hide an error."""

from contextlib import nullcontext

import dense
import pytest
import torch
import torch.nn.functional as F
from dense import Linear, weight_gradients_in_place
from torch import Tensor, nn

needs_onednn = pytest.mark.skipif(dense._onednn() is None, reason="a torch without oneDNN")
SHAPES = [(1, 8, 24), (7, 24, 8), (64, 16, 16), (130, 48, 16), (130, 16, 48)]


@pytest.fixture(params=["onednn", "torch"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways, whichever is the faster one here."""
    if request.param == "onednn" and dense._onednn() is None:
        pytest.skip("a torch without oneDNN")
    monkeypatch.setattr(dense, "_onednn_is_faster", lambda: request.param == "onednn")
    return str(request.param)


def layer(inputs: int, outputs: int) -> Linear:
    made = Linear(inputs, outputs)
    generator = torch.Generator().manual_seed(inputs * outputs)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    return made


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def exact(made: nn.Linear) -> nn.Linear:
    """torch's own layer, in float64."""
    copy = nn.Linear(made.in_features, made.out_features).double()
    copy.load_state_dict(made.state_dict())
    return copy


def assert_near(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None and expected is not None
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, atol=2e-6 * scale, rtol=0)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_output_and_gradients_are_those_of_torchs_layer(kind: str, rows: int, inputs: int, outputs: int) -> None:
    ours = layer(inputs, outputs)
    theirs = exact(ours)
    x = random(rows, inputs).requires_grad_()
    y = x.detach().double().requires_grad_()
    factor = random(rows, outputs)
    (ours(x) * factor).sum().backward()
    (theirs(y) * factor.double()).sum().backward()
    assert_near(ours(x).detach(), theirs(y).detach())
    assert_near(x.grad, y.grad)
    assert_near(ours.weight.grad, theirs.weight.grad)
    assert_near(ours.bias.grad, theirs.bias.grad)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_gelu_is_torchs_of_the_layers_output(kind: str, approximate: str, with_gradient: bool) -> None:
    ours = layer(24, 40)
    x = random(50, 24)
    with torch.set_grad_enabled(with_gradient):
        found = ours.with_gelu(x, approximate)
    assert found.requires_grad == with_gradient
    assert_near(found.detach(), F.gelu(exact(ours)(x.double()), approximate=approximate).detach())


def test_gradients_are_added_to_those_that_are_there(kind: str) -> None:
    """Into the same memory: views of one buffer, as the training step has them."""
    ours = layer(16, 48)
    x = random(20, 16)
    once = torch.autograd.grad(ours(x).square().sum(), list(ours.parameters()))
    buffer = torch.ones(sum(p.numel() for p in ours.parameters()))
    start = 0
    for parameter in ours.parameters():
        parameter.grad = buffer[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    ours(x).square().sum().backward()
    expected = 1 + torch.cat([g.flatten() for g in once])
    torch.testing.assert_close(buffer, expected)


def test_in_place_gradients_are_those_of_autograd(kind: str) -> None:
    ours, theirs = layer(16, 48), layer(16, 48)
    for made, context in ((ours, weight_gradients_in_place()), (theirs, nullcontext())):
        for parameter in made.parameters():
            parameter.grad = torch.ones_like(parameter)
        kept = made.weight.grad
        x = random(20, 16).requires_grad_()
        loss = (made(x) * random(20, 48)).sum() + made(2 * x).square().sum()  # the layer twice
        with context:
            loss.backward()
        assert made.weight.grad is kept
        made.x = x  # type: ignore[assignment]
    assert_near(ours.weight.grad, theirs.weight.grad.double())
    assert_near(ours.bias.grad, theirs.bias.grad.double())
    assert_near(ours.x.grad, theirs.x.grad.double())


def test_in_place_gradients_pass_no_hook_and_need_a_gradient_that_is_there(kind: str) -> None:
    ours, x, seen = layer(16, 8), random(4, 16), []
    with weight_gradients_in_place():
        ours(x).sum().backward()
    once = ours.weight.grad.clone()
    assert_near(once, x.sum(0).double().expand(8, -1))
    ours.weight.register_hook(seen.append)
    with weight_gradients_in_place():
        ours(x).sum().backward()
    assert len(seen) == 1 and seen[0] is not None
    assert_near(ours.weight.grad, 2 * once.double())


def test_a_part_of_a_weight_passes_its_gradient_on_to_the_whole(kind: str) -> None:
    """Also where that part has a gradient of its own to keep."""
    ours, x = layer(16, 8), random(4, 16)
    ours.weight.grad = torch.zeros_like(ours.weight)
    part = ours.weight[:3]
    part.retain_grad()
    for _ in range(2):
        with weight_gradients_in_place():
            dense.linear(x, part, None).sum().backward(retain_graph=True)
    assert_near(ours.weight.grad[:3], 2 * x.sum(0).double().expand(3, -1))


def test_gradients_that_are_asked_for_leave_those_that_are_there_alone(kind: str) -> None:
    ours, x = layer(16, 8), random(4, 16)
    ours.weight.grad = torch.ones_like(ours.weight)
    (found,) = torch.autograd.grad(ours(x).sum(), [ours.weight])
    assert_near(found, x.sum(0).double().expand(8, -1))
    assert torch.equal(ours.weight.grad, torch.ones_like(ours.weight))


def test_a_layer_that_is_split_lacks_its_bias_or_has_it(kind: str) -> None:
    ours, x = layer(16, 8), random(4, 16)
    output, bias = ours.split(x)
    assert_near((output if bias is None else output + bias).detach(), exact(ours)(x.double()).detach())
    for other in (random(2, 3, 16), x.double()):
        made = ours.double() if other.dtype == torch.float64 else ours
        assert made.split(other)[1] is None


def test_a_frozen_layer_gets_no_gradient_and_passes_one_on(kind: str) -> None:
    ours = layer(16, 8).requires_grad_(False)
    x = random(4, 16).requires_grad_()
    ours(x).sum().backward()
    assert ours.weight.grad is None and ours.bias.grad is None
    assert_near(x.grad, ours.weight.double().sum(0).expand(4, -1))


@needs_onednn
def test_no_rows_three_dimensions_other_types_and_autocast_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("oneDNN was used")

    monkeypatch.setattr(dense, "product", fail)
    monkeypatch.setattr(dense, "_onednn_is_faster", lambda: True)
    ours = layer(16, 8)
    with pytest.raises(AssertionError, match="oneDNN was used"):
        ours(random(4, 16))
    assert ours(random(0, 16)).shape == (0, 8)
    assert ours(random(2, 3, 16)).shape == (2, 3, 8)
    assert layer(16, 8).double()(random(4, 16).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(random(4, 16)).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert ours(random(4, 16)).shape == (4, 8)


@needs_onednn
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000])
def test_rows_are_padded_to_a_multiple(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_onednn_is_faster", lambda: True)
    padding = dense.padded_rows(random(rows, 4))
    assert 0 <= padding < dense.ROWS_MULTIPLE and (rows + padding) % dense.ROWS_MULTIPLE == 0


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_onednn_is_the_faster_one_with_avx512_unless_the_processor_is_intels(
    vendor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_is_intel", lambda: vendor == "GenuineIntel")
    monkeypatch.setattr(dense, "_onednn", lambda: torch.relu)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for capability in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        expected = vendor == "AuthenticAMD" and capability == "AVX512"
        assert dense._onednn_is_faster.__wrapped__() == expected


def test_nothing_is_padded_for_torchs_own_products() -> None:
    assert dense.padded_rows(random(7, 4).double()) == 0
