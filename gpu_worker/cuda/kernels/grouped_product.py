"""Routed experts of a prompt: the rows that chose an expert, together, on tensor cores.

Weights are looked up in registers and go straight into the product; nothing is decoded into memory. A tile is
up to 128 rows of one expert by some outputs and all columns, so sums have one order: a row's product depends
neither on the rows beside it, nor on the size of tiles, nor on where the expert's record lies. Operands are
rounded to the compute dtype: activations after they are rotated, weights as centroids. Norms are applied to
the float32 sums of blocks, which measured as exact as rounding the products of norms and centroids, and
faster. Not done here: who chose whom, fetching records, combining, and decode steps (`expert_products`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from common.hlwq.planes import BLOCK, RAW_BITS, padded
from common.record import MatrixLayout, RecordLayout
from gpu_worker.cuda.kernels.packed_words import tile_centroids, tile_dot, tile_row
from gpu_worker.cuda.kernels.rotation import tile_rotate

Span = tuple[int, int]

# Rows of a tile; without tensor cores, each product of a tile is an instruction of its own.
_ROWS = {torch.bfloat16: (16, 32, 64, 128), torch.float32: (16,)}
_DECODING = 64  # what looking up a tile's weights costs, in rows


def grouped_products_plain(
    x: Tensor, layout: RecordLayout, records: Sequence[Tensor], spans: Sequence[Span],
    positions: Tensor, k: int, products: Tensor,
) -> None:  # fmt: skip
    """products[p] = down(relu(up(x[p // k]))^2) in float32 by record i, for p in positions[spans[i]].

    x (rows, hidden); records uint8, 1-D; positions int64; products (rows * k, hidden) float32, of which
    nothing else is written.
    """
    for record, (start, end) in zip(records, spans, strict=True):
        where = positions[start:end]
        inner = layout.up.view(record).product(x[where // k].float())
        products[where] = layout.down.view(record).product(torch.relu(inner).square())


class GroupedExperts:
    """The experts of one layer, prepared for launches."""

    def __init__(self, layout: RecordLayout) -> None:
        self._layout = layout
        self._up, self._down = _Projection(layout.up, True), _Projection(layout.down, False)

    def prepare(self, x: Tensor) -> Tensor:
        """x (rows, hidden) float32 or bfloat16 as these experts take it, once for all calls of a layer."""
        return x.contiguous() if self._layout.up.bits == RAW_BITS else tile_rotate(x, x.dtype)

    def __call__(
        self, x: Tensor, records: Sequence[int], spans: Sequence[Span], positions: Tensor, k: int,
        products: Tensor,
    ) -> None:  # fmt: skip
        """As `grouped_products_plain`, for prepared x and the addresses of records in the device's memory.

        positions (any number,) int64 and products lie on the device; spans, on the host, may be any of
        positions, not empty. Never waits for the device.
        """
        if not records:
            return
        starts, ends = np.array(spans, dtype=np.int64).T
        counts = ends - starts
        size = _tile_size(counts, x.dtype)
        tiles = _on_device(_tiles(np.array(records, dtype=np.int64), starts, counts, size), x.device)
        arguments = (tiles, positions, size, k)
        inner = torch.empty(counts.sum(), self._layout.up.out_features, dtype=torch.float32, device=x.device)
        self._up(x, inner, *arguments)
        self._down(self._activated(inner, x.dtype), products, *arguments)

    def _activated(self, inner: Tensor, dtype: torch.dtype) -> Tensor:
        if self._layout.down.bits == RAW_BITS:
            return torch.relu(inner).square().to(dtype)
        return tile_rotate(inner, dtype, squared_relu=True)


def _tile_size(counts: np.ndarray, dtype: torch.dtype) -> int:
    """The rows of a tile that make a call of experts with so many rows cheapest."""
    return min(_ROWS[dtype], key=lambda size: (-(-counts // size)).sum() * (size + _DECODING))


def _tiles(records: np.ndarray, starts: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """All tiles of up to `size` rows, (tiles, 4) int64.

    Of each: its record, where its positions start, its first row among all of the call, its number of rows.
    """
    numbers = -(-counts // size)
    expert = np.repeat(np.arange(len(counts)), numbers)
    done = (np.arange(len(expert)) - (numbers.cumsum() - numbers)[expert]) * size
    row = (counts.cumsum() - counts)[expert] + done
    return np.stack([records[expert], starts[expert] + done, row, np.minimum(counts[expert] - done, size)], 1)


def _on_device(table: np.ndarray, device: torch.device) -> Tensor:
    """By way of page-locked memory, so that the host waits for nothing."""
    tensor = torch.from_numpy(table)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _tile_shape(size: int, bits: int) -> dict[str, int]:
    """The launch of tiles of `size` rows: outputs, warps and stages as measured best on an H100."""
    large = size == 128
    # Stages hide less than their bookkeeping costs where many small tiles do; and they would bring centroids
    # that are gathered, not shuffled, by way of shared memory, one by one.
    stages = 3 if bits == RAW_BITS or (large and bits <= 5) else 1
    return {"ROWS": size, "OUTS": 128 if large else 64, "num_warps": 8 if large else 4, "num_stages": stages}


class _Projection:
    """One matrix of every expert."""

    def __init__(self, layout: MatrixLayout, gather: bool) -> None:
        """`gather`: x is read at positions, else y is written there; the other's rows are the call's."""
        self._outs, self._bits, self._raw = layout.out_features, layout.bits, layout.bits == RAW_BITS
        self._constants: dict[str, int | str] = {"LOW": layout.planes[0].offset, "GATHER": gather}
        if self._raw:
            self._constants |= {"COLUMNS": layout.in_features}
        else:
            assert layout.norms is not None and layout.codebook is not None
            self._constants |= {
                "HIGH": layout.planes[-1].offset, "NORMS": layout.norms.offset,
                "CODEBOOK": layout.codebook.offset, "BITS": layout.bits,
                "BLOCKS": padded(layout.in_features) // BLOCK,
            }  # fmt: skip

    def __call__(self, x: Tensor, y: Tensor, tiles: Tensor, positions: Tensor, size: int, k: int) -> None:
        kernel, shape = _raw_kernel if self._raw else _packed_kernel, _tile_shape(size, self._bits)
        grid = triton.cdiv(self._outs, shape["OUTS"]), tiles.shape[0]
        kernel[grid](tiles, positions, x, y, self._outs, k, **self._constants, **shape)


@triton.jit
def _tile_of(tiles, positions, k, GATHER: tl.constexpr, ROWS: tl.constexpr):
    """This program's tile: its record, the rows of x and of y that its rows are, and which of these are real.

    The others repeat the last one, so that no load of activations has to be masked.
    """
    tile = tiles + tl.program_id(1) * 4
    first, row = tl.load(tile + 1), tl.load(tile + 2)
    index, last = tl.arange(0, ROWS), tl.load(tile + 3) - 1
    mine = tl.minimum(index, last)
    position = tl.load(positions + first + mine)
    row += mine
    if GATHER:
        source, target = position // k, row
    else:
        source, target = row, position
    return tl.load(tile), source, target, index <= last


@triton.jit
def _store(y, target, real, out, outs, total):
    pointers = y + target[None, :] * outs + out[:, None]
    tl.store(pointers, total, mask=real[None, :] & (out < outs)[:, None])


@triton.jit
def _packed_kernel(
    tiles, positions, x, y, outs, k, LOW: tl.constexpr, HIGH: tl.constexpr, NORMS: tl.constexpr,
    CODEBOOK: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr,
    GATHER: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    record, source, target, real = _tile_of(tiles, positions, k, GATHER, ROWS)
    # Records begin at multiples of 4096 bytes.
    low = tl.multiple_of((record + LOW).to(tl.pointer_type(tl.int32)), 16)
    high = tl.multiple_of((record + HIGH).to(tl.pointer_type(tl.int32)), 16)
    norms = (record + NORMS).to(tl.pointer_type(tl.float16))
    codebook = (record + CODEBOOK).to(tl.pointer_type(tl.float32))
    start = tl.program_id(0) * OUTS
    out, row = start + tl.arange(0, OUTS), tl.minimum(start + tile_row(OUTS), outs - 1)[:, None]
    x_columns = x + source[None, :] * (BLOCKS * 128) + tl.arange(0, 128)[:, None]
    norm_rows = norms + tl.minimum(out, outs - 1) * BLOCKS
    total = tl.zeros([OUTS, ROWS], tl.float32)
    for block in tl.range(0, BLOCKS):
        weights = tile_centroids(low, high, codebook, row, block, BITS, BLOCKS, OUTS)
        activations = tl.load(x_columns + block * 128)
        sums = tile_dot(weights.to(activations.dtype), activations, tl.zeros([OUTS, ROWS], tl.float32))
        total += sums * tl.load(norm_rows + block).to(tl.float32)[:, None]
    _store(y, target, real, out, outs, total)


@triton.jit
def _raw_kernel(
    tiles, positions, x, y, outs, k, LOW: tl.constexpr, COLUMNS: tl.constexpr, GATHER: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    record, source, target, real = _tile_of(tiles, positions, k, GATHER, ROWS)
    weights = tl.multiple_of((record + LOW).to(tl.pointer_type(tl.bfloat16)), 16)
    out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    rows = weights + tl.minimum(out, outs - 1)[:, None] * COLUMNS
    total = tl.zeros([OUTS, ROWS], tl.float32)
    for start in tl.range(0, COLUMNS, 64):
        column = start + tl.arange(0, 64)
        inside = column < COLUMNS
        tile = tl.load(rows + column[None, :], mask=inside[None, :], other=0.0)
        values = tl.load(x + source[None, :] * COLUMNS + column[:, None], mask=inside[:, None], other=0.0)
        total = tile_dot(tile.to(x.dtype.element_ty), values, total)
    _store(y, target, real, out, outs, total)
