"""Routing vectors in sequences (Heinsen 2022, arXiv 2211.11754): input vectors to a few output vectors, each a mixture
of votes in which an input counts by how well the output predicts it.

The paper's networks A, F, G and S are those of its efficient form, in which the votes are never written down: a vote is
linear in the input, so that the mixture of the inputs is taken first.

Shape letters: B rows, I input vectors of a row, J output vectors, D size of an input, E size of an output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(nn.Module):
    """(B, I, D) -> (B, J, E)."""

    def __init__(
        self, num_inputs: int | None, num_outputs: int, input_size: int, output_size: int, iterations: int
    ) -> None:
        """num_inputs: I, each input of a kind of its own, with parameters of its own; None for any number of one kind.
        num_outputs: 2 or more, or there is nothing to share the inputs among."""
        super().__init__()
        assert num_outputs > 1
        self.num_outputs, self.iterations, self.is_normalized = num_outputs, iterations, output_size > 1
        kinds = num_inputs or 1
        self.activation_weight = nn.Parameter(torch.empty(kinds, input_size))  # A
        self.activation_bias = nn.Parameter(torch.empty(kinds))
        self.vote_factor = nn.Parameter(torch.empty(num_outputs, input_size))  # F
        self.vote_matrix = nn.Parameter(torch.empty(input_size, output_size))
        self.vote_bias = nn.Parameter(torch.empty(num_outputs * output_size))  # vectors: weight decay spares them
        self.prediction_matrix = nn.Parameter(torch.empty(output_size, input_size))  # G
        self.prediction_factor = nn.Parameter(torch.empty(num_outputs, input_size))
        self.prediction_bias = nn.Parameter(torch.empty(num_outputs * input_size))
        self.score_factor = nn.Parameter(torch.empty(kinds, num_outputs))  # S
        self.score_bias = nn.Parameter(torch.empty(kinds * num_outputs))
        if num_inputs is not None:
            self.benefit = nn.Parameter(torch.empty(num_inputs, num_outputs))  # beta_use
            self.cost = nn.Parameter(torch.empty(num_inputs, num_outputs))  # beta_ignore
        else:
            self.benefit_of, self.cost_of = nn.Linear(input_size, num_outputs), nn.Linear(input_size, num_outputs)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Normal weights that leave sizes as they are, biases 0."""
        input_size, output_size = self.vote_matrix.shape
        deviations = {
            "activation_weight": 2 * input_size**-0.5,
            "vote_matrix": 2 * input_size**-0.5,
            "prediction_matrix": output_size**-0.5,
            "score_factor": input_size**-0.5,
            "benefit_of.weight": input_size**-0.5,
            "cost_of.weight": input_size**-0.5,
        }
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=deviations.get(name, 1.0), generator=generator)

    def forward(self, inputs: Tensor, is_real: Tensor | None = None) -> Tensor:
        """is_real: (B, I) which of the inputs are there; None for all."""
        if is_real is None:
            is_real = inputs.new_ones(inputs.shape[:2], dtype=torch.bool)
        scaled = inputs * is_real.sum(1).to(inputs.dtype).rsqrt()[:, None, None]  # (B, I, D)
        activations = torch.sigmoid((scaled * self.activation_weight).sum(-1) + self.activation_bias)  # (B, I): f(A(x))
        data = torch.where(is_real, activations, 0)[:, :, None]  # (B, I, 1)
        is_fixed = hasattr(self, "benefit")
        benefit = self.benefit if is_fixed else self.benefit_of(inputs)  # (B, I, J)
        cost = self.cost if is_fixed else self.cost_of(inputs)
        bias = self.vote_bias.view(self.num_outputs, -1)
        shares = inputs.new_full((self.num_outputs,), 1 / self.num_outputs)  # R
        for iteration in range(self.iterations):
            used = data * shares  # D-step: what of an input an output uses, and what it ignores
            ignored = data - used
            credit = benefit * used - cost * ignored  # M-step: phi, (B, I, J)
            mixed = credit.transpose(1, 2) @ scaled  # (B, J, D)
            outputs = mixed * self.vote_factor @ self.vote_matrix + credit.sum(1)[:, :, None] * bias
            if self.is_normalized:
                outputs = F.layer_norm(outputs, outputs.shape[-1:])  # (B, J, E)
            if iteration < self.iterations - 1:
                shares = self._shares(inputs, outputs)
        return outputs

    def _shares(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """E-step: (B, I, J) of each input the outputs' shares, by how well they predict it."""
        bias, of_scores = self.prediction_bias.view(self.num_outputs, -1), self.score_bias.view(-1, self.num_outputs)
        predicted = outputs @ self.prediction_matrix * self.prediction_factor + bias  # (B, J, D)
        scores = inputs @ predicted.transpose(1, 2) * self.score_factor + of_scores
        # The logarithm of a sigmoid: written as one, ONNX has the logarithm of 0 where scores are far below it.
        return (-F.softplus(-scores)).softmax(-1)
