"""Rows of a packed matrix times one row of activations: what a decode step's products are made of.

A program takes several rows of the matrix, one after the other. Its lanes keep their share of the
activations in registers, and a row's weights are on their way while the row before is multiplied. Sums of a
row have one order, however rows are divided among programs. Not done here: where a matrix lies.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.packed_words import (
    INTERPRETED,
    activations,
    block_norms,
    centroid_table,
    codes_of,
    four_products,
    raw_words,
)

_CHUNK = 8  # blocks that a warp's lanes load together, 16 bytes each
_MOST_CHUNKS = 3  # of a row that each lane keeps activations for: 32 registers each
# Warps a multiprocessor that these registers leave room for, by chunks.
_WARPS = {1: 24, 2: 16, 3: 12}


class RowShape:
    """How rows of `blocks` blocks of `bits` are taken: the constants of a launch, and its programs."""

    def __init__(self, bits: int, blocks: int) -> None:
        chunk, warps = min(_CHUNK, triton.next_power_of_2(blocks)), 1
        while triton.cdiv(blocks, chunk * warps) > _MOST_CHUNKS:
            warps *= 2
        self._chunks, self.warps = triton.cdiv(blocks, chunk * warps), warps
        self.constants: dict[str, Any] = {
            "BITS": bits, "BLOCKS": blocks, "SPAN": chunk * warps, "CHUNKS": self._chunks,
            "AT_ONCE": 64 if INTERPRETED else 1, "num_warps": warps,
        }  # fmt: skip

    def rows(self, outs: int, matrices: int = 1) -> int:
        """Rows that a program takes, so that those of all `matrices` fill the device once."""
        programs = _multiprocessors() * _WARPS[self._chunks] // self.warps
        return max(self.constants["AT_ONCE"], triton.cdiv(outs * matrices, programs))


@cache
def _multiprocessors() -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties().multi_processor_count


@triton.jit
def _row_words(
    low, high, norms, row, CHUNK: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr,
    SPAN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Words (see `raw_words`) and norms of a chunk of rows (rows, 1), as loaded; nothing beyond CHUNKS.

    Taken apart only when they are multiplied: that would wait for the load.
    """
    word, four = tl.arange(0, SPAN * 16)[None, :] + row * 0, tl.arange(0, SPAN * 4)[None, :] + row * 0
    if CHUNK < CHUNKS:
        block: tl.constexpr = CHUNK * SPAN
        full: tl.constexpr = block + SPAN <= BLOCKS
        first, second = raw_words(
            low, high, row, block, word, block + word // 16 < BLOCKS, BITS, BLOCKS, full
        )
        scale = block_norms(norms, row, block, four, block + four // 4 < BLOCKS, BLOCKS, full)
    else:
        first, second, scale = word, word, four.to(tl.float16)
    return first, second, scale


@triton.jit
def _row_activations(x, CHUNK: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr, CHUNKS: tl.constexpr):
    """The eight fields of a chunk's activations, in the order in which `_chunk_products` takes them."""
    if CHUNK < CHUNKS:
        word = tl.arange(0, SPAN * 16)[None, :]
        first: tl.constexpr = CHUNK * SPAN
        full: tl.constexpr = first + SPAN <= BLOCKS
        valid = first + word // 16 < BLOCKS
        return (
            activations(x, first, word, valid, 0, full), activations(x, first, word, valid, 2, full),
            activations(x, first, word, valid, 4, full), activations(x, first, word, valid, 6, full),
            activations(x, first, word, valid, 1, full), activations(x, first, word, valid, 3, full),
            activations(x, first, word, valid, 5, full), activations(x, first, word, valid, 7, full),
        )  # fmt: skip
    else:  # noqa: RET505, the compiler wants both branches
        return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0


@triton.jit
def _chunk_products(first, second, scale, x, table, BITS: tl.constexpr):
    """Sums of four words' products each: (rows, words / 4). A lane has four words, and their norm."""
    word = tl.arange(0, first.shape[1])[None, :]
    even, odd = codes_of(first, second, word, BITS)
    a, b, c, d, e, f, g, h = x
    sums = four_products(even, table, a, b, c, d, tl.zeros_like(even).to(tl.float32), BITS)
    sums = four_products(odd, table, e, f, g, h, sums, BITS)
    return tl.sum(tl.reshape(sums, [first.shape[0], first.shape[1] // 4, 4]), 2) * scale.to(tl.float32)


@triton.jit
def row_products(
    low, high, norms, codebook, x, y, residual, begin, end,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr, CHUNKS: tl.constexpr,
    AT_ONCE: tl.constexpr, ADD: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """y[row] = W[row] . x for rows begin to end - 1, plus residual[row] where ADD, in y's type.

    low, high: planes as int32 pointers (high is unused where bits have one plane); norms float16; x a float32
    pointer to one row of rotated activations. FIXED: W was there when the kernel began.
    """
    lane = tl.arange(0, AT_ONCE)
    row = tl.minimum(begin + lane, end - 1)[:, None]
    first0, second0, scale0 = _row_words(low, high, norms, row, 0, BITS, BLOCKS, SPAN, CHUNKS)
    first1, second1, scale1 = _row_words(low, high, norms, row, 1, BITS, BLOCKS, SPAN, CHUNKS)
    first2, second2, scale2 = _row_words(low, high, norms, row, 2, BITS, BLOCKS, SPAN, CHUNKS)
    x0 = _row_activations(x, 0, BLOCKS, SPAN, CHUNKS)
    x1 = _row_activations(x, 1, BLOCKS, SPAN, CHUNKS)
    x2 = _row_activations(x, 2, BLOCKS, SPAN, CHUNKS)
    table = centroid_table(codebook, first0, BITS, FIXED)
    for start in tl.range(begin, end, AT_ONCE, num_stages=1):
        # A chunk is loaded anew as soon as it is used: the load has the time of the other chunks. The ifs are
        # always taken. Without them the compiler mixes the chunks, and puts all loads off to the row's end.
        row = tl.minimum(start + AT_ONCE + lane, end - 1)[:, None]
        total = _chunk_products(first0, second0, scale0, x0, table, BITS)
        first0, second0, scale0 = _row_words(low, high, norms, row, 0, BITS, BLOCKS, SPAN, CHUNKS)
        if CHUNKS > 1:  # noqa: SIM102, the compiler's if and the device's
            if end > 0:
                total += _chunk_products(first1, second1, scale1, x1, table, BITS)
                first1, second1, scale1 = _row_words(low, high, norms, row, 1, BITS, BLOCKS, SPAN, CHUNKS)
        if CHUNKS > 2:  # noqa: SIM102
            if begin > -1:
                total += _chunk_products(first2, second2, scale2, x2, table, BITS)
                first2, second2, scale2 = _row_words(low, high, norms, row, 2, BITS, BLOCKS, SPAN, CHUNKS)
        sums = tl.sum(total, 1)
        out = start + lane
        inside = out < end
        if ADD:
            sums += tl.load(residual + out, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + out, sums.to(y.dtype.element_ty), mask=inside)
