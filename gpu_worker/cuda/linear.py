"""A dense projection on the GPU for the few rows of a decode step: packed by Triton, plain by cuBLAS.

Both take the same activations, which carry both of their forms. Prompts use `gpu_worker.model.linear`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import RAW_BITS
from gpu_worker.cuda.kernels import rotation
from gpu_worker.cuda.kernels.packed_product import PackedProduct
from gpu_worker.model.linear import Linear
from gpu_worker.model.weights import MLPWeights


class Activations(NamedTuple):
    """Rows as plain projections want them and as packed ones do; None for a form that was not made."""

    plain: Tensor | None  # (rows, columns)
    rotated: Tensor | None  # (rows, blocks, 128) float32, see `kernels.rotation`


class StepLinear:
    """y = x W^T for a decode step's rows."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        """`dtype`: in which plain products are computed."""
        weight = linear.weight
        if isinstance(weight, PackedMatrix) and weight.bits == RAW_BITS:
            weight = weight.planes[0].view(torch.bfloat16).to(dtype)
        self._plain = weight if isinstance(weight, Tensor) else None
        self._product = PackedProduct(weight) if isinstance(weight, PackedMatrix) else None

    @property
    def packed(self) -> bool:
        """Whether it wants rotated activations."""
        return self._product is not None

    def __call__(self, x: Activations, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        """x to (rows, out) in `dtype`, plus the residual; which, given, is also where the result goes."""
        if self._product is not None:
            assert x.rotated is not None
            return self._product(x.rotated, residual, dtype, out=residual)
        assert self._plain is not None and x.plain is not None
        y = F.linear(x.plain.to(self._plain.dtype), self._plain).to(dtype)
        return y if residual is None else residual.add_(y)


class StepMLP:
    """down(relu(up(x)) squared): a `-` block's mixer, or a shared expert."""

    def __init__(self, weights: MLPWeights, dtype: torch.dtype) -> None:
        self._up, self._down = StepLinear(weights.up_proj, dtype), StepLinear(weights.down_proj, dtype)

    def __call__(self, x: Activations, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        inner = squared_relu(self._up(x, torch.float32), self._down.packed)
        return self._down(inner, dtype, residual)


def squared_relu(inner: Tensor, rotated: bool) -> Activations:
    """relu(inner) squared, for inner (rows, columns) float32, in the one form that is wanted."""
    if rotated:
        return Activations(None, rotation.relu2_rotate(inner))
    return Activations(torch.relu(inner).square(), None)
