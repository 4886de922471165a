"""Heads against their formula."""

import pytest
import torch

from heads import HEADS, MlpHead
from helpers import RecordedMasks, generator, randomize_vectors, tiny_config
from parameters import NoParameters


@pytest.mark.parametrize(("name", "num_hidden"), [("linear", 0), ("mlp", 1), ("mlp", 3)])
def test_a_head_is_dropout_and_linear_behind_its_hidden_layers(name: str, num_hidden: int) -> None:
    parameters = MlpHead.Parameters(num_hidden) if num_hidden else NoParameters()
    head = HEADS[name](parameters, tiny_config(hidden_dropout_prob=0.4), 40, 5)
    assert isinstance(head, torch.nn.Module)
    randomize_vectors(head, 3)
    pooled, masks = torch.randn(7, 40, generator=generator(1)), RecordedMasks(2)
    logits = head(pooled, masks)
    assert [prob for prob, _ in masks.drawn] == [0.4] * (num_hidden + 1)
    tensors = list(head.parameters())  # weight, bias of each layer, from the input on
    widths = [40, *[32] * num_hidden, 5]
    assert [tuple(weight.shape) for weight in tensors[::2]] == list(zip(widths[1:], widths, strict=False))
    for found, factors in ((logits, [mask.view(7, -1) for _, mask in masks.drawn]), (head(pooled, None), None)):
        expected = pooled
        for i in range(num_hidden + 1):
            expected = expected.clamp(min=0) if i else expected
            expected = (expected * factors[i] if factors else expected) @ tensors[2 * i].T + tensors[2 * i + 1]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_absorbs_a_scale_gives_for_features_what_it_gave_for_standardized_ones(name: str) -> None:
    parameters = MlpHead.Parameters(2) if name == "mlp" else NoParameters()
    head = HEADS[name](parameters, tiny_config(), 40, 5)
    assert isinstance(head, torch.nn.Module)
    randomize_vectors(head, 3)
    features, scale = torch.randn(7, 40, generator=generator(1)), torch.rand(40, generator=generator(2)) + 0.1
    shift = torch.randn(40, generator=generator(3))
    expected = head((features - shift) / scale, None)
    head.absorb(shift, scale)
    torch.testing.assert_close(head(features, None), expected, rtol=1e-4, atol=1e-4)
