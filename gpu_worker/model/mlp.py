"""The ungated feed-forward of NemotronH: the `-` blocks, and the shared expert inside a MoE block.

Routed experts compute the same function, from packed records; that is not done here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gpu_worker.model.states import Step
from gpu_worker.model.weights import MLPWeights


def relu2_mlp(x: Tensor, weights: MLPWeights) -> Tensor:
    """down(relu(up(x)) squared) for x (rows, hidden)."""
    return weights.down_proj(F.relu(weights.up_proj(x)).square())


class MLP:
    """A `-` block's mixer. Its rows are independent, so every kind of step is the same to it."""

    def __init__(self, weights: MLPWeights) -> None:
        self.weights = weights

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return relu2_mlp(x, self.weights)
