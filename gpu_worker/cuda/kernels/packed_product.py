"""Products of 1 to 16 rotated rows with a packed matrix of dense weights.

Weights are looked up and multiplied in registers; nothing is decoded into memory. A program takes some
outputs and all columns, so that sums have one order. Several rows share the look-ups and are multiplied by
tensor cores, as exactly as one row: each operand is split into two of 11 bits. Not done here: rotating
(`rotation`), routed experts (`expert_products`), products of many rows (`matrix_decode`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK
from gpu_worker.cuda.kernels.overlap import overlapping, wait_for_inputs
from gpu_worker.cuda.kernels.packed_words import (
    INTERPRETED,
    centroid_table,
    codes_of,
    four_centroids,
    raw_words,
)
from gpu_worker.cuda.kernels.rotation import product_order
from gpu_worker.cuda.kernels.row_products import RowShape, row_products

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
        self._one_row = RowShape(matrix.bits, self._blocks)

    def __call__(
        self, x: Tensor, residual: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """As `product_plain`, for contiguous x of up to MAX_ROWS rows. `out` may be the residual."""
        rows, outs = x.shape[0], self.matrix.shape[0]
        assert 1 <= rows <= MAX_ROWS and x.is_contiguous()
        y = torch.empty(rows, outs, dtype=dtype, device=x.device) if out is None else out
        low, high = self._planes[0], self._planes[-1]
        arguments = (low, high, self._norms, self._codebook, x, y, y if residual is None else residual, outs)
        constants = {"ADD": residual is not None, **overlapping()}
        if rows == 1:
            taken = self._one_row.rows(outs)
            grid = (triton.cdiv(outs, taken),)
            _one_row_kernel[grid](*arguments, taken, **self._one_row.constants, **constants)
        else:
            grid, padded = (triton.cdiv(outs, _OUTS),), 8 if rows <= 8 else 16
            warps = min(triton.next_power_of_2(self._blocks), 8 if outs < _FEW_OUTS else 4)
            _several_rows_kernel[grid](
                *arguments, rows, BITS=self.matrix.bits, BLOCKS=self._blocks, AT_ONCE=warps, OUTS=_OUTS,
                ROWS=padded, num_warps=warps, **constants,
            )  # fmt: skip
        return y


# Outputs of several rows' programs, which have a warp for each of the blocks that they take at once; as
# measured best on an H100. The interpreter takes as long for a program of many outputs as for one of few.
_OUTS = 64 if INTERPRETED else 16
_FEW_OUTS = 8192  # programs of more warps, if that few outputs make too few programs


@triton.jit(do_not_specialize=["taken"])
def _one_row_kernel(
    low, high, norms, codebook, x, y, residual, outs, taken, BITS: tl.constexpr, BLOCKS: tl.constexpr,
    SPAN: tl.constexpr, CHUNKS: tl.constexpr, AT_ONCE: tl.constexpr,
    ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    begin = tl.program_id(0) * taken
    row_products(
        low, high, norms, codebook, x, y, residual, begin, tl.minimum(begin + taken, outs),
        BITS, BLOCKS, SPAN, CHUNKS, AT_ONCE, ADD, True,
    )  # fmt: skip


@triton.jit
def _several_rows_kernel(
    low, high, norms, codebook, x, y, residual, outs, rows, BITS: tl.constexpr, BLOCKS: tl.constexpr,
    ADD: tl.constexpr, OUTS: tl.constexpr, AT_ONCE: tl.constexpr, ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    # Each warp takes a block of its own. What a lane loads at once is what its tensor core wants of it, if
    # rows are taken in this order: see `packed_words.tile_centroids`.
    start, batch = tl.program_id(0) * OUTS, tl.arange(0, AT_ONCE)
    word = tl.arange(0, 16)[None, :]
    loaded = tl.arange(0, OUTS * AT_ONCE)[:, None]
    row = tl.minimum(start + loaded // (8 * AT_ONCE) * 8 + loaded % 8, outs - 1)
    loaded_x = tl.arange(0, ROWS * AT_ONCE)[:, None]
    x_row = tl.minimum(loaded_x // (8 * AT_ONCE) * 8 + loaded_x % 8, rows - 1)
    x_words = x + x_row * (BLOCKS * 128) + word
    norm_rows = norms + tl.minimum(start + tl.arange(0, OUTS), outs - 1).to(tl.int64)[None, :] * BLOCKS
    total = tl.zeros([AT_ONCE, OUTS, ROWS], tl.float32)
    for first in tl.range(0, BLOCKS, AT_ONCE, num_stages=1):
        block = tl.minimum(first + loaded // 8 % AT_ONCE, BLOCKS - 1)
        raw = raw_words(low, high, row, block, word, word < 16, BITS, BLOCKS, True)
        even, odd = codes_of(raw[0], raw[1], word, BITS)
        table = centroid_table(codebook, even, BITS)
        x_block = x_words + tl.minimum(first + loaded_x // 8 % AT_ONCE, BLOCKS - 1) * 128
        sums = tl.zeros([AT_ONCE, OUTS, ROWS], tl.float32)
        a, b, c, d = four_centroids(even, table, BITS)
        sums = _split_dot(a, tl.load(x_block), sums)
        sums = _split_dot(b, tl.load(x_block + 32), sums)
        sums = _split_dot(c, tl.load(x_block + 64), sums)
        sums = _split_dot(d, tl.load(x_block + 96), sums)
        a, b, c, d = four_centroids(odd, table, BITS)
        sums = _split_dot(a, tl.load(x_block + 16), sums)
        sums = _split_dot(b, tl.load(x_block + 48), sums)
        sums = _split_dot(c, tl.load(x_block + 80), sums)
        sums = _split_dot(d, tl.load(x_block + 112), sums)
        # Blocks beyond the last repeat it, and count 0.
        norm = tl.load(norm_rows + first + batch[:, None], mask=first + batch[:, None] < BLOCKS, other=0.0)
        total += sums * norm.to(tl.float32)[:, :, None]
    sums = tl.sum(total, 0)
    index, out = tl.arange(0, ROWS)[None, :], start + tl.arange(0, OUTS)[:, None]
    where, inside = index * outs + out, (index < rows) & (out < outs)
    if ADD:
        sums += tl.load(residual + where, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + where, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _split_dot(weights, x, sums):
    """sums (batch, outs, rows) + weights x for one field: (outs * batch, 16 words) and (rows * batch, 16).

    As three products of operands that tensor cores take whole: what they drop is below 2^-22.
    """
    a = tl.reshape(weights, [sums.shape[1] // 8, sums.shape[0], 8, 4, 4])
    a = tl.reshape(tl.permute(a, (1, 0, 2, 4, 3)), [sums.shape[0], sums.shape[1], 16])
    b = tl.reshape(x, [sums.shape[2] // 8, sums.shape[0], 8, 4, 4])
    b = tl.reshape(tl.permute(b, (1, 4, 3, 0, 2)), [sums.shape[0], 16, sums.shape[2]])
    a_high, b_high = _eleven_bits(a), _eleven_bits(b)
    sums = tl.dot(a - a_high, b_high, sums, input_precision="tf32")
    sums = tl.dot(a_high, b - b_high, sums, input_precision="tf32")
    return tl.dot(a_high, b_high, sums, input_precision="tf32")


@triton.jit
def _eleven_bits(x):
    """x, cut to what tf32 holds."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
