"""Products of any number of rows with a packed matrix of dense weights, in the cheaper of two ways.

Up to 16 rows are `packed_product`'s. For more the matrix is decoded, some outputs at a time, into memory that
is given back at once, and multiplied by cuBLAS. It stays rotated: activations are rotated instead. Not done
here: products fused with what surrounds them in a decode step (`gpu_worker.cuda.linear`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK
from gpu_worker.cuda.kernels.packed_product import MAX_ROWS, PackedProduct
from gpu_worker.cuda.kernels.packed_words import tile_centroids, tile_row
from gpu_worker.cuda.kernels.rotation import rotate, tile_order, tile_rotate

MOST_DECODED = 64 << 20  # bytes

_OUTS = 64  # outputs of a program


def decode_plain(matrix: PackedMatrix, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of W as `tile_rotate`d activations are multiplied by: (rows, padded columns) in `dtype`."""
    part = matrix.rows(rows)
    assert part.codebook is not None and part.norms is not None
    levels = part.codebook[part.codes().int()].view(*part.norms.shape, BLOCK)
    return (levels[:, :, tile_order(levels.device)] * part.norms.float()[:, :, None]).flatten(1).to(dtype)


class PackedLinear:
    """y = x W^T for one packed matrix, in x's type: float32 or bfloat16."""

    def __init__(self, matrix: PackedMatrix) -> None:
        assert matrix.norms is not None and matrix.codebook is not None, "raw matrices are for cuBLAS"
        self._few, self._outs = PackedProduct(matrix), matrix.shape[0]
        planes = [plane.view(torch.int32) for plane in matrix.planes]
        self._packed = planes[0], planes[-1], matrix.norms, matrix.codebook
        self._constants = {
            "BITS": matrix.bits, "BLOCKS": matrix.norms.shape[1],
        }  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        return self._product(rows).view(*x.shape[:-1], self._outs)

    def _product(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self._outs)
        if x.shape[0] <= MAX_ROWS:
            return self._few(rotate(x), None, x.dtype)
        rotated = tile_rotate(x, x.dtype).flatten(1)
        at_once = min(self._outs, MOST_DECODED // (rotated.shape[1] * x.element_size()))
        decoded = torch.empty(at_once, rotated.shape[1], dtype=x.dtype, device=x.device)
        if at_once == self._outs:  # as nearly always, and short prompts wait for the host
            return F.linear(rotated, self.decode(slice(0, self._outs), decoded))
        y = torch.empty(x.shape[0], self._outs, dtype=x.dtype, device=x.device)
        for first in range(0, self._outs, at_once):
            part = self.decode(slice(first, min(first + at_once, self._outs)), decoded)
            torch.mm(rotated, part.T, out=y[:, first : first + at_once])
        return y

    def decode(self, rows: slice, decoded: Tensor) -> Tensor:
        """As `decode_plain`, into the first rows of `decoded`, which are returned."""
        part = decoded[: rows.stop - rows.start]
        grid = (triton.cdiv(part.shape[0], _OUTS), part.shape[1] // BLOCK)
        _decode_kernel[grid](
            *self._packed, part, rows.start, rows.stop, **self._constants, OUTS=_OUTS, num_warps=4
        )
        return part


@triton.jit
def _decode_kernel(
    low, high, norms, codebook, decoded, first, end, BITS: tl.constexpr, BLOCKS: tl.constexpr,
    OUTS: tl.constexpr,
):  # fmt: skip
    start, block = first + tl.program_id(0) * OUTS, tl.program_id(1)
    row, out = tl.minimum(start + tile_row(OUTS), end - 1)[:, None], start + tl.arange(0, OUTS)
    tile = tile_centroids(low, high, codebook, row, block, BITS, BLOCKS, OUTS)
    norm = tl.load(norms + tl.minimum(out, end - 1).to(tl.int64) * BLOCKS + block).to(tl.float32)
    pointers = decoded + (out - first)[:, None].to(tl.int64) * (BLOCKS * 128) + block * 128
    weights = (tile * norm[:, None]).to(decoded.dtype.element_ty)
    tl.store(pointers + tl.arange(0, 128)[None, :], weights, mask=(out < end)[:, None])
