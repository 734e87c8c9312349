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
    LookUp,
    activations,
    block_norms,
    code_words,
    four_products,
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
        self._chunks, self._warps = triton.cdiv(blocks, chunk * warps), warps
        self.constants: dict[str, Any] = {
            "BITS": bits, "BLOCKS": blocks, "SPAN": chunk * warps, "CHUNKS": self._chunks,
            "ASSEMBLY": LookUp(bits).products, "AT_ONCE": 64 if INTERPRETED else 1, "num_warps": warps,
        }  # fmt: skip

    def rows(self, outs: int, matrices: int = 1) -> int:
        """Rows that a program takes, so that those of all `matrices` fill the device once."""
        programs = _multiprocessors() * _WARPS[self._chunks] // self._warps
        return max(self.constants["AT_ONCE"], triton.cdiv(outs * matrices, programs))


@cache
def _multiprocessors() -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties().multi_processor_count


@triton.jit
def _row_weights(
    low, high, norms, row, CHUNK: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr,
    SPAN: tl.constexpr, CHUNKS: tl.constexpr, LOOSE: tl.constexpr,
):  # fmt: skip
    """Codes (even, odd; see `code_words`) and norms of a chunk of rows (rows, 1); nothing beyond CHUNKS."""
    word = tl.arange(0, SPAN * 16)[None, :] + row * 0
    if CHUNK < CHUNKS:
        first: tl.constexpr = CHUNK * SPAN
        full: tl.constexpr = first + SPAN <= BLOCKS
        valid = first + word // 16 < BLOCKS
        even, odd = code_words(low, high, row, first, word, valid, BITS, BLOCKS, full, LOOSE)
        scale = block_norms(norms, row, first, word, valid, BLOCKS, full)
    else:
        even, odd, scale = word, word, word.to(tl.float32)
    return even, odd, scale


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
def _chunk_products(even, odd, scale, x, codebook, ASSEMBLY: tl.constexpr):
    a, b, c, d, e, f, g, h = x
    sums = four_products(even, codebook, a, b, c, d, tl.zeros_like(even).to(tl.float32), ASSEMBLY)
    return four_products(odd, codebook, e, f, g, h, sums, ASSEMBLY) * scale


@triton.jit
def row_products(
    low, high, norms, codebook, x, y, residual, begin, end,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr, CHUNKS: tl.constexpr,
    ASSEMBLY: tl.constexpr, AT_ONCE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """y[row] = W[row] . x for rows begin to end - 1, plus residual[row] where ADD, in y's type.

    low, high: planes as int32 pointers (high is unused where bits have one plane); norms float16; x a float32
    pointer to one row of rotated activations.
    """
    lane = tl.arange(0, AT_ONCE)
    row = tl.minimum(begin + lane, end - 1)[:, None]
    even0, odd0, scale0 = _row_weights(low, high, norms, row, 0, BITS, BLOCKS, SPAN, CHUNKS, ASSEMBLY != "")
    even1, odd1, scale1 = _row_weights(low, high, norms, row, 1, BITS, BLOCKS, SPAN, CHUNKS, ASSEMBLY != "")
    even2, odd2, scale2 = _row_weights(low, high, norms, row, 2, BITS, BLOCKS, SPAN, CHUNKS, ASSEMBLY != "")
    x0 = _row_activations(x, 0, BLOCKS, SPAN, CHUNKS)
    x1 = _row_activations(x, 1, BLOCKS, SPAN, CHUNKS)
    x2 = _row_activations(x, 2, BLOCKS, SPAN, CHUNKS)
    for start in tl.range(begin, end, AT_ONCE, num_stages=1):
        row = tl.minimum(start + AT_ONCE + lane, end - 1)[:, None]
        next_even0, next_odd0, next_scale0 = _row_weights(
            low, high, norms, row, 0, BITS, BLOCKS, SPAN, CHUNKS, ASSEMBLY != ""
        )
        next_even1, next_odd1, next_scale1 = _row_weights(
            low, high, norms, row, 1, BITS, BLOCKS, SPAN, CHUNKS, ASSEMBLY != ""
        )
        next_even2, next_odd2, next_scale2 = _row_weights(
            low, high, norms, row, 2, BITS, BLOCKS, SPAN, CHUNKS, ASSEMBLY != ""
        )
        total = _chunk_products(even0, odd0, scale0, x0, codebook, ASSEMBLY)
        if CHUNKS > 1:
            total += _chunk_products(even1, odd1, scale1, x1, codebook, ASSEMBLY)
        if CHUNKS > 2:
            total += _chunk_products(even2, odd2, scale2, x2, codebook, ASSEMBLY)
        sums = tl.sum(total, 1)
        out = start + lane
        inside = out < end
        if ADD:
            sums += tl.load(residual + out, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + out, sums.to(y.dtype.element_ty), mask=inside)
        even0, odd0, scale0 = next_even0, next_odd0, next_scale0
        even1, odd1, scale1 = next_even1, next_odd1, next_scale1
        even2, odd2, scale2 = next_even2, next_odd2, next_scale2
