"""A dense projection, plain or packed: one call whatever its weights are kept as."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.hlwq import native
from common.hlwq.matrix import PackedMatrix, raw_matrix


class Linear:
    """y = x W^T for W (out, in); `weight` is W in the compute dtype, or packed."""

    def __init__(self, weight: Tensor | PackedMatrix) -> None:
        self.weight = weight
        self._product: Callable[[Tensor], Tensor] = self._plain
        if isinstance(weight, PackedMatrix):
            self._product = _packed_product(weight)

    @classmethod
    def of(cls, weight: Tensor | PackedMatrix, dtype: torch.dtype, device: torch.device) -> Linear:
        """A stored matrix on `device`. The native kernels compute from bfloat16 as it is stored, mapped file
        included, so for them nothing is copied; elsewhere plain weights are cast to the compute dtype."""
        if isinstance(weight, PackedMatrix):
            return cls(weight.to(device))
        if device.type == "cpu" and weight.dtype == torch.bfloat16 and native.usable(weight):
            return cls(raw_matrix(weight))
        return cls(weight.to(device, dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x.dtype."""
        return self._product(x)

    def computed_by(self, product: Callable[[Tensor], Tensor]) -> None:
        """From now on by `product`, which has the same weights."""
        self._product = product

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def _plain(self, x: Tensor) -> Tensor:
        assert isinstance(self.weight, Tensor)
        return F.linear(x, self.weight)


def _packed_product(matrix: PackedMatrix) -> Callable[[Tensor], Tensor]:
    """Decoding a token makes a hundred short calls of these: whatever can be prepared, is."""
    return native.Product(matrix) if native.usable(*matrix.planes) else matrix.product
