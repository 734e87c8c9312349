"""A dense projection, plain or packed: one call whatever its weights are kept as."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from common.hlwq.matrix import PackedMatrix


@dataclass(frozen=True)
class Linear:
    """y = x W^T for W (out, in); `weight` is W in the compute dtype, or packed."""

    weight: Tensor | PackedMatrix

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x.dtype."""
        if isinstance(self.weight, Tensor):
            return F.linear(x, self.weight)
        return self.weight.product(x)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes
