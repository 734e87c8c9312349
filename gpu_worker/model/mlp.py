"""The ungated feed-forward of NemotronH: the `-` blocks, and the shared expert inside a MoE block.

Routed experts compute the same function, from packed records; that is not done here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from common.hlwq import native
from common.hlwq.matrix import PackedMatrix
from gpu_worker.model.states import Step
from gpu_worker.model.weights import MLPWeights


def relu2_mlp(x: Tensor, weights: MLPWeights) -> Tensor:
    """down(relu(up(x)) squared) for x (rows, hidden)."""
    return weights.down_proj(F.relu(weights.up_proj(x)).square())


class MLP:
    """A `-` block's mixer, or a shared expert. Rows are independent: every kind of step is the same to it."""

    def __init__(self, weights: MLPWeights) -> None:
        self.weights = weights
        self._kernel: Callable[[Tensor], Tensor] | None = None
        up, down = weights.up_proj.weight, weights.down_proj.weight
        if isinstance(up, PackedMatrix) and isinstance(down, PackedMatrix) and native.usable(*up.planes):
            self._kernel = native.FeedForward(up, down)

    def __call__(self, x: Tensor, step: Step | None = None) -> Tensor:
        """x (rows, hidden) to (rows, hidden)."""
        return relu2_mlp(x, self.weights) if self._kernel is None else self._kernel(x)
