"""Products of 1 to 16 rotated rows with a packed matrix of dense weights.

Weights are looked up and multiplied in registers; nothing is decoded into memory. A program takes some
outputs and all columns, so that sums have one order. Several rows share the look-ups. Not done here: rotating
(`rotation`), routed experts (`expert_products`), products of many rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK
from gpu_worker.cuda.kernels.packed_words import (
    INTERPRETED,
    LookUp,
    activations,
    block_norms,
    blocks_at_once,
    code_words,
    four_centroids,
    tile_products,
)
from gpu_worker.cuda.kernels.rotation import product_order

MAX_ROWS = 16


def product_plain(x: Tensor, matrix: PackedMatrix, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (rows, blocks, 128) rotated, W (out, in) packed to x W^T (rows, out) in `dtype`, plus `residual`."""
    assert matrix.codebook is not None and matrix.norms is not None
    order = product_order(x.device)
    levels = matrix.codebook[matrix.codes().int()].view(matrix.shape[0], -1, BLOCK)[:, :, order]
    weights = levels * matrix.norms.float()[:, :, None]
    y = x.flatten(1) @ weights.flatten(1).T
    return (y if residual is None else y + residual.float()).to(dtype)


class PackedProduct:
    """One matrix, prepared: its planes as words, and the shape of its launches."""

    def __init__(self, matrix: PackedMatrix) -> None:
        assert matrix.norms is not None and matrix.codebook is not None, "raw matrices are for cuBLAS"
        self.matrix = matrix
        self._planes = [plane.view(torch.int32) for plane in matrix.planes]
        self._norms, self._codebook = matrix.norms, matrix.codebook
        self._blocks = matrix.norms.shape[1]
        self._look_up = LookUp(matrix.bits)

    def __call__(
        self, x: Tensor, residual: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """As `product_plain`, for contiguous x of up to MAX_ROWS rows. `out` may be the residual."""
        rows, outs = x.shape[0], self.matrix.shape[0]
        assert 1 <= rows <= MAX_ROWS and x.is_contiguous()
        y = torch.empty(rows, outs, dtype=dtype, device=x.device) if out is None else out
        low, high = self._planes[0], self._planes[-1]
        arguments = (low, high, self._norms, self._codebook, x, y, y if residual is None else residual, outs)
        constants = {
            "BITS": self._look_up.bits, "BLOCKS": self._blocks, "AT_ONCE": blocks_at_once(self._blocks),
            "ADD": residual is not None,
        }  # fmt: skip
        if rows == 1:
            grid, tile = (triton.cdiv(outs, _ONE["OUTS"]),), _ONE
            _one_row_kernel[grid](*arguments, **constants, **tile, ASSEMBLY=self._look_up.products)
        else:
            grid, padded = (triton.cdiv(outs, _SEVERAL["OUTS"]),), triton.next_power_of_2(rows)
            _several_rows_kernel[grid](
                *arguments, rows, **constants, **_SEVERAL, ROWS=padded, ASSEMBLY=self._look_up.centroids
            )
        return y


# Outputs a program, and warps, as measured best on an H100. The interpreter takes as long for a program of
# many outputs as for one of few.
_ONE = {"OUTS": 64 if INTERPRETED else 4, "num_warps": 1}
_SEVERAL = {"OUTS": 64 if INTERPRETED else 4, "num_warps": 2}


@triton.jit
def _one_row_kernel(
    low, high, norms, codebook, x, y, residual, outs, BITS: tl.constexpr, BLOCKS: tl.constexpr,
    ADD: tl.constexpr, OUTS: tl.constexpr, AT_ONCE: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    row, word = tl.minimum(out, outs - 1)[:, None], tl.arange(0, AT_ONCE * 16)[None, :]
    total = tl.zeros([OUTS, AT_ONCE * 16], tl.float32)
    for block in tl.static_range(0, BLOCKS, AT_ONCE):
        total += tile_products(
            low, high, norms, codebook, x, row, block, word,
            BITS, BLOCKS, ASSEMBLY, block + AT_ONCE <= BLOCKS,
        )  # fmt: skip
    sums = tl.sum(total, 1)
    if ADD:
        sums += tl.load(residual + out, mask=out < outs, other=0.0).to(tl.float32)
    tl.store(y + out, sums.to(y.dtype.element_ty), mask=out < outs)


@triton.jit
def _several_rows_kernel(
    low, high, norms, codebook, x, y, residual, outs, rows, BITS: tl.constexpr, BLOCKS: tl.constexpr,
    ADD: tl.constexpr, OUTS: tl.constexpr, AT_ONCE: tl.constexpr, ROWS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    # The tile is (rows of activations, outputs, words). Rows are the slowest axis, so that a thread keeps all
    # of them, and what it loads and looks up for one of them serves the others.
    out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    row, word = tl.minimum(out, outs - 1)[None, :, None], tl.arange(0, AT_ONCE * 16)[None, None, :]
    activation = tl.arange(0, ROWS)
    x_rows = x + tl.minimum(activation, rows - 1)[:, None, None] * (BLOCKS * 128)
    spread = word + row * 0 + activation[:, None, None] * 0
    total = tl.zeros([ROWS, OUTS, AT_ONCE * 16], tl.float32)
    for block in tl.range(0, BLOCKS, AT_ONCE, num_stages=1):
        valid = block + spread // 16 < BLOCKS
        even, odd = code_words(low, high, row + spread * 0, block, spread, valid, BITS, BLOCKS, False)
        sums = tl.zeros([ROWS, OUTS, AT_ONCE * 16], tl.float32)
        a, b, c, d = four_centroids(even, codebook, ASSEMBLY)
        sums += a * activations(x_rows, block, spread, valid, 0, False)
        sums += b * activations(x_rows, block, spread, valid, 2, False)
        sums += c * activations(x_rows, block, spread, valid, 4, False)
        sums += d * activations(x_rows, block, spread, valid, 6, False)
        a, b, c, d = four_centroids(odd, codebook, ASSEMBLY)
        sums += a * activations(x_rows, block, spread, valid, 1, False)
        sums += b * activations(x_rows, block, spread, valid, 3, False)
        sums += c * activations(x_rows, block, spread, valid, 5, False)
        sums += d * activations(x_rows, block, spread, valid, 7, False)
        total += sums * block_norms(norms, row, block, spread, valid, BLOCKS, False)
    sums = tl.sum(total, 2)
    where = activation[:, None] * outs + out[None, :]
    inside = (activation[:, None] < rows) & (out[None, :] < outs)
    if ADD:
        sums += tl.load(residual + where, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + where, sums.to(y.dtype.element_ty), mask=inside)
