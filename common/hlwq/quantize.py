"""Weights to codes: normalise, rotate, take the nearest centroid.

The plain algorithm of the paper, but the nearest centroid comes from one table look-up and one comparison
instead of a comparison with every level. A value within 1e-6 of the midpoint of two centroids counts as a
tie and takes the lower code, so that the rounding of a particular BLAS never decides a code.

Own packs fit each block's norm to its codes instead of taking the paper's ||w||. That is one float16 a block
either way, so decoders see no difference; the error is smaller by 3 % at 3 bits, 8 % at 4 and 11 % above.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import CheckpointError
from common.hlwq import native
from common.hlwq.hadamard import hadamard_transform
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK, RAW_BITS, pack_planes, padded

# Fitting a norm starts from these shares of ||w||: small ones resolve a block's many small values better,
# large ones its few large values. 1 is among them, so that a fitted norm is never worse than the paper's.
NORM_SHARES = (0.76, 0.82, 0.88, 0.94, 1.0, 1.06, 1.12, 1.18)

_CANNOT = "weights are not finite, or too large for a float16 norm"
_TIE = 1e-6
_SMALLEST_NORM = 1e-10
_LARGEST_NORM = torch.finfo(torch.float16).max
_ROWS_AT_ONCE = 256  # keeps the intermediates of a usual row length in the last-level cache


class NearestCentroid:
    """Codes of values under one codebook, by a uniform grid finer than the closest two midpoints.

    No cell of the grid holds two midpoints, so a cell knows its lowest code and the one threshold above
    which the next code holds.
    """

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook
        self.midpoints = midpoints = (codebook[:-1] + codebook[1:]) / 2 + _TIE
        # 0.9: the grid's own rounding must not put two midpoints into one cell.
        self.cell = float(midpoints.diff().min()) * 0.9
        self.origin = float(midpoints[0]) - self.cell
        self.last = int((float(midpoints[-1]) - self.origin) / self.cell) + 1
        edges = self.origin + self.cell * torch.arange(self.last + 1, dtype=torch.float64)
        lowest = torch.bucketize(edges.float(), midpoints)
        self.lowest = lowest.to(torch.uint8)
        self.threshold = torch.cat([midpoints, midpoints.new_tensor([math.inf])])[lowest]

    def __call__(self, values: Tensor) -> Tensor:
        """Codes uint8 of `values` float32, same shape."""
        cells = ((values - self.origin) * (1 / self.cell)).clamp_(0, self.last).int().view(-1)
        codes = self.lowest.index_select(0, cells)
        codes += values.view(-1) > self.threshold.index_select(0, cells)
        return codes.view(values.shape)


def quantize(weight: Tensor, codebook: Tensor, fit_norms: bool = False) -> tuple[Tensor, Tensor]:
    """W (out, in) float -> codes uint8 (out, padded in), norms float16 (out, blocks).

    Norms are ||w|| as in the paper, or fitted to the codes. Raises CheckpointError when a weight is not
    finite or a block's norm exceeds float16.
    """
    nearest = NearestCentroid(codebook)
    if native.usable(weight):
        found = native.quantize(weight, nearest, NORM_SHARES if fit_norms else ())
        if found is None:
            raise CheckpointError(_CANNOT)
        return found
    columns = padded(weight.shape[1])
    codes = torch.empty(weight.shape[0], columns, dtype=torch.uint8)
    norms = torch.empty(weight.shape[0], columns // BLOCK, dtype=torch.float16)
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        blocks = F.pad(weight[rows].float(), (0, columns - weight.shape[1])).view(-1, BLOCK)
        norm = torch.linalg.vector_norm(blocks, dim=1, keepdim=True)
        if not bool((norm <= _LARGEST_NORM).all()):  # false for NaN as well
            raise CheckpointError(_CANNOT)
        norm.clamp_min_(_SMALLEST_NORM)
        rotated = hadamard_transform(blocks.div_(norm)).mul_(math.sqrt(BLOCK))
        if fit_norms:
            share = _best_share(rotated, codebook, nearest)
            chosen = nearest(rotated / share)
            norm.mul_(_fit(rotated, codebook, chosen)[0]).clamp_max_(_LARGEST_NORM)
        else:
            chosen = nearest(rotated)
        codes[rows] = chosen.view(-1, columns)
        norms[rows] = norm.view(-1, columns // BLOCK).half()
    return codes, norms


def pack_matrix(weight: Tensor, bits: int, codebook: Tensor | None, fit_norms: bool = False) -> PackedMatrix:
    """W (out, in) -> its packed form at `bits`; 16 bits round to bfloat16 and need no codebook."""
    if bits == RAW_BITS:
        raw = weight.to(torch.bfloat16).contiguous()
        if not bool(torch.isfinite(raw).all()):
            raise CheckpointError("weights are not finite")
        return PackedMatrix(bits, weight.shape[1], (raw.view(torch.uint8),), None, None)
    assert codebook is not None
    codes, norms = quantize(weight, codebook, fit_norms)
    return PackedMatrix(bits, weight.shape[1], pack_planes(codes, bits), norms, codebook)


def _best_share(rotated: Tensor, codebook: Tensor, nearest: NearestCentroid) -> Tensor:
    """The share of ||w|| that fits the codes chosen under some of NORM_SHARES best: (blocks, 1).

    `rotated` (blocks, 128) has norm sqrt(128). A block of zeros keeps 1.
    """
    best = rotated.new_zeros(rotated.shape[0], 1)
    share = torch.ones_like(best)
    for candidate in NORM_SHARES:
        fitted, gain = _fit(rotated, codebook, nearest(rotated / candidate))
        share = torch.where(gain > best, fitted, share)
        best = torch.maximum(gain, best)
    return share


def _fit(rotated: Tensor, codebook: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The factor s that minimises ||z - s c[code]|| for each block z, and by how much it lowers ||z||²."""
    levels = codebook.index_select(0, codes.view(-1).int()).view(rotated.shape)
    product, square = torch.linalg.vecdot(rotated, levels), torch.linalg.vecdot(levels, levels)
    fitted = (product / square)[:, None]
    return fitted, fitted * product[:, None]
