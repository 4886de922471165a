"""oneDNN's products against torch's own, in float64 where rounding must not hide an error."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dense
from dense import Linear

needs_onednn = pytest.mark.skipif(dense._onednn() is None, reason="no AVX-512, or a torch without oneDNN")
SHAPES = [(1, 8, 24), (7, 24, 8), (64, 16, 16), (130, 48, 16), (130, 16, 48)]


@pytest.fixture(params=["onednn", "torch"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways, the second as on a machine without the first."""
    if request.param == "torch":
        monkeypatch.setattr(dense, "_onednn", lambda: None)
    elif dense._onednn() is None:
        pytest.skip("no AVX-512, or a torch without oneDNN")
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
def test_rows_are_padded_to_a_multiple(rows: int) -> None:
    padding = dense.padded_rows(random(rows, 4))
    assert 0 <= padding < dense.ROWS_MULTIPLE and (rows + padding) % dense.ROWS_MULTIPLE == 0


def test_nothing_is_padded_for_torchs_own_products() -> None:
    assert dense.padded_rows(random(7, 4).double()) == 0
