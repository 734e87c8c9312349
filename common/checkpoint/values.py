"""Which values cannot be right, in whatever form a weight is stored.

Whoever reads a matrix of codes checks it as it is read, and names it; plain weights are checked by whoever
packs them. A damaged code is as good as any other: of codes, checksums alone can tell.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.errors import CheckpointError
from common.hlwq.matrix import PackedMatrix

_INFINITY = 0x7C00  # in float16


def is_finite(weights: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # The extremes are NaN if any value is; a mask of finite values would take as much memory again.
    return bool(torch.isfinite(torch.stack(torch.aminmax(weights))).all())


def are_norms(norms: Tensor) -> bool:
    """Whether every value can be the norm of a block."""
    if norms.dtype is torch.float16:
        # As integers those from 0 up to the largest are all below infinity, and no other value is among them
        # but -0: half the time.
        lowest, highest = torch.aminmax(norms.view(torch.int16))
        if lowest >= 0:
            return bool(highest < _INFINITY)
    return bool(((norms >= 0) & (norms < math.inf)).all())  # false for NaN as well


def check_values(matrix: PackedMatrix) -> None:
    """Raise CheckpointError, with what is wrong with it, for a matrix that cannot be right."""
    if matrix.norms is None or matrix.codebook is None:
        if not is_finite(matrix.planes[0].view(torch.bfloat16)):
            raise CheckpointError("has weights that are not finite")
        return
    if not are_norms(matrix.norms):
        raise CheckpointError("has norms that are negative or not finite")
    codebook = matrix.codebook
    if not bool(torch.isfinite(codebook).all()) or not bool((codebook.diff() > 0).all()):
        raise CheckpointError("has a codebook that is not finite or not ascending")
