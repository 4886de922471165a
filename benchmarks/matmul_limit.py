"""What the matrix products of an encoder take at least: their operations, and the rate of a device at them.

Shape letters: N packed tokens, B rows, D hidden.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bert import BertConfig
from ops import Replayed
from ops.linear import rows_multiple


def matmul_flops(config: BertConfig, lengths: np.ndarray) -> int:
    """Floating-point operations of the encoder's matrix products, pooler included, in one forward pass.

    lengths: (B,) of the rows. A backward pass has twice as many: a gradient for either factor.
    """
    size, num_tokens, num_scores = config.hidden_size, int(lengths.sum()), int((lengths.astype(np.int64) ** 2).sum())
    of_layer = num_tokens * (8 * size**2 + 4 * size * config.intermediate_size) + 4 * size * num_scores
    return config.num_hidden_layers * of_layer + 2 * len(lengths) * size**2


class MatmulLimit:
    """The matrix products of an encoder's dense layers, at these shapes and by torch, and nothing else.

    What a device needs for them bounds from below what a pass over the same tokens can take. Each layer has matrices
    of its own, as in the encoder, so that they come from memory as often as there.
    """

    def __init__(
        self,
        config: BertConfig,
        passes: Sequence[np.ndarray],
        training: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """passes: of each pass that will be run the lengths (B,) of its rows. training: the products of the backward
        pass too."""
        self.config, self.training, self.device = config, training, torch.device(device)
        size = config.hidden_size
        shapes = [(3 * size, size), (size, size), (config.intermediate_size, size), (size, config.intermediate_size)]
        shapes = [*shapes * config.num_hidden_layers, (size, size)]
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self._weights = [random(*shape) for shape in shapes]
        most = max(self._places(lengths) for lengths in passes) * max(max(shape) for shape in shapes)
        self._inputs, self._gradients = random(most), random(most)
        self._results = random(max(most, *(weight.numel() for weight in self._weights)))
        # A GPU takes less time for the products of a few rows than the host for launching them one by one.
        self._take = Replayed(self._pass) if self.device.type == "cuda" else self._pass
        for _ in range(2):  # no kernel is made, and no graph recorded, in a timed run
            self.run(*{self._key(lengths): lengths for lengths in passes}.values())

    def run(self, *passes: np.ndarray) -> None:
        """The products of passes over rows of these lengths."""
        for lengths in passes:
            self._take(self._key(lengths))

    def _key(self, lengths: np.ndarray) -> tuple[int, int]:
        return self._places(lengths), len(lengths)

    def _pass(self, key: tuple[int, int]) -> Tensor:
        num_places, num_rows = key
        *dense, pooler = self._weights
        for weight in dense:
            self._products(weight, num_places)
        self._products(pooler, num_rows)
        return self._results

    def _places(self, lengths: np.ndarray) -> int:
        """Rows of the encoder's matrices: the tokens of these rows, and those that belong to no row."""
        num_tokens = int(lengths.sum())
        multiple = rows_multiple(self.device, num_tokens)
        return -(-num_tokens // multiple) * multiple

    def _products(self, weight: Tensor, num_places: int) -> None:
        """Of one layer."""
        width_out, width_in = weight.shape
        inputs = _leading(self._inputs, num_places, width_in)
        self._product(inputs, weight.t())
        if self.training:
            self._product(_leading(self._gradients, num_places, width_out), weight)
            self._product(_leading(self._gradients, width_out, num_places), inputs)

    def _product(self, left: Tensor, right: Tensor) -> None:
        torch.mm(left, right, out=_leading(self._results, len(left), right.shape[1]))

    def seconds(self, passes: Sequence[np.ndarray], measured: float) -> float:
        """Seconds of all products of these passes over real tokens, attention's too, at the rate that `run` reached.

        measured: seconds of `run` on these passes.
        """
        *dense, pooler = (weight.numel() for weight in self._weights)
        done = sum(2 * self._places(lengths) * sum(dense) + 2 * len(lengths) * pooler for lengths in passes)
        return measured * sum(matmul_flops(self.config, lengths) for lengths in passes) / done


def _leading(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)
