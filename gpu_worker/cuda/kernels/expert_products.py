"""Routed experts of 1 to 16 rows, computed from the slot pool by slot id: the pool is the weight tensor.

Each (row, rank) pair is computed alone, whatever slot its record lies in and whatever stands beside it, and
`combine` adds a row's pairs in rank order: neither slots nor waves nor batches change a bit. Pairs of a batch
that chose the same expert read it from the second-level cache. Not done here: choosing (`router`), resolving
experts to slots and filling these (`slots`), prompts (`grouped_product`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.hlwq.planes import BLOCK, RAW_BITS, padded
from common.record import MatrixLayout
from gpu_worker.cuda.kernels.lane import HANDED_OVER, Lane, wait_for_answer
from gpu_worker.cuda.kernels.orders import Coming, lanes, wait_for_slot
from gpu_worker.cuda.kernels.overlap import overlapping, wait_for_inputs
from gpu_worker.cuda.kernels.packed_product import product_plain
from gpu_worker.cuda.kernels.packed_words import INTERPRETED
from gpu_worker.cuda.kernels.row_products import RowShape, row_products

_RAW_TILE = {"OUTS": 64 if INTERPRETED else 4, "WIDTH": 512, "num_warps": 4}


def expert_products_plain(
    x: Tensor, layout: MatrixLayout, pool: Tensor, slot_ids: Tensor, k: int, out: Tensor | None = None
) -> Tensor:
    """One projection of each pair's expert: x (pairs / k, ...) to (pairs, out) float32, into `out` if given.

    pool (slots, stride) uint8 of one layer; slot_ids (pairs,) int32, negative for pairs that are left as they
    are; pair p reads row p // k of x, rotated: (rows, blocks, 128) float32. For a matrix of raw weights x is
    (rows, in) of any float type.
    """
    y = out if out is not None else torch.empty(slot_ids.shape[0], layout.out_features, device=x.device)
    for pair, slot in enumerate(slot_ids.tolist()):
        if slot < 0:
            continue
        matrix, row = layout.view(pool[slot]), x[pair // k][None]
        if layout.bits == RAW_BITS:
            y[pair] = (row.float() @ matrix.planes[0].view(torch.bfloat16).float().T)[0]
        else:
            y[pair] = product_plain(row, matrix, None, torch.float32)[0]
    return y


class Products(NamedTuple):
    """What the experts of each (row, rank) made of its row, and where that is."""

    here: Tensor  # (rows * k, hidden) float32
    # Of one row: products of pairs whose slot ids (k,) say that they were handed over come by this lane.
    lane: Lane | None = None
    slot_ids: Tensor | None = None


def combine_plain(products: Products, weights: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    """residual + shared + the weighted sum of the products in rank order.

    weights (rows, k) float32; shared and residual (rows, hidden), whose type the result has; rounded once.
    """
    rows, k = weights.shape
    ranked = products.here.view(rows, k, -1)
    if products.lane is not None and products.slot_ids is not None:
        elsewhere = (products.slot_ids[:k] == HANDED_OVER.value)[None, :, None]
        while elsewhere.any() and int(products.lane.mailbox.answered) != int(products.lane.posted):
            pass
        ranked = torch.where(elsewhere, products.lane.mailbox.products.to(ranked.device), ranked)
    total = ranked[:, 0] * weights[:, :1]
    for rank in range(1, k):
        total = total + ranked[:, rank] * weights[:, rank : rank + 1]
    return (total + shared.float() + residual.float()).to(residual.dtype)


class ExpertProducts:
    """One projection of one layer's experts, prepared for launches."""

    def __init__(self, layout: MatrixLayout) -> None:
        self.layout = layout
        self._raw = layout.bits == RAW_BITS
        if not self._raw:
            assert layout.norms is not None and layout.codebook is not None
            self._shape = RowShape(layout.bits, padded(layout.in_features) // BLOCK)
            self._offsets = {
                "LOW": layout.planes[0].offset, "HIGH": layout.planes[-1].offset,
                "NORMS": layout.norms.offset, "CODEBOOK": layout.codebook.offset,
            }  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        pool: Tensor,
        slot_ids: Tensor,
        k: int,
        out: Tensor | None = None,
        coming: Coming | None = None,
    ) -> Tensor:
        """As `expert_products_plain`, for contiguous x; slot ids of any integer type.

        coming: what the launch before this one sees to. Each product waits for its own record alone.
        """
        layout, pairs = self.layout, slot_ids.shape[0]
        y = out
        if y is None:
            y = torch.empty(pairs, layout.out_features, dtype=torch.float32, device=x.device)
        arguments = (pool, slot_ids, x, y, layout.out_features, pool.stride(0), k)
        if self._raw:
            grid = triton.cdiv(layout.out_features, _RAW_TILE["OUTS"]), pairs
            columns, offset = layout.in_features, layout.planes[0].offset
            _raw_kernel[grid](*arguments, COLUMNS=columns, OFFSET=offset, **_RAW_TILE, **overlapping())
        else:
            rows = self._shape.rows(layout.out_features, pairs)
            grid = triton.cdiv(layout.out_features, rows), pairs
            count = 0
            awaited: tuple[Tensor | int | None, ...] = (None, None, None, 0)
            if coming is not None and overlapping()["OVERLAP"]:
                orders = coming.orders
                awaited, count = (orders.slot, orders.done, orders.due, coming.layer), orders.slot.shape[1]
            constants = self._shape.constants | {"ORDERS": count, "LANES": lanes(count, self._shape.warps)}
            _packed_kernel[grid](*arguments, rows, *awaited, **self._offsets, **constants, **overlapping())
        return y


def combine(products: Products, weights: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    """As `combine_plain`, into `residual`, which is returned."""
    rows, hidden = residual.shape
    k, block, lane = weights.shape[1], 128, products.lane
    grid = (triton.cdiv(hidden, block), rows)
    answer: tuple[Tensor | None, ...] = (None,) * 5
    if lane is not None:
        answer = (products.slot_ids, lane.posted, lane.mailbox.answered, lane.heard, lane.mailbox.products)
    _combine_kernel[grid](
        products.here, weights, shared, residual, hidden, *answer,
        K=k, PAIRS=triton.next_power_of_2(k), BLOCK=block, LANE=lane is not None, num_warps=1,
        **overlapping(),
    )  # fmt: skip
    return residual


@triton.jit
def _record_of(pool, slot, stride):
    # Records begin at multiples of 4096 bytes.
    return tl.multiple_of(pool + slot.to(tl.int64) * stride, 128)


@triton.jit(do_not_specialize=["rows", "layer"])
def _packed_kernel(
    pool, slot_ids, x, y, outs, stride, k, rows, order_slot, done, due, layer,
    LOW: tl.constexpr, HIGH: tl.constexpr, NORMS: tl.constexpr, CODEBOOK: tl.constexpr, BITS: tl.constexpr,
    BLOCKS: tl.constexpr, SPAN: tl.constexpr, CHUNKS: tl.constexpr, ORDERS: tl.constexpr, LANES: tl.constexpr,
    AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # With orders this runs beside the copying, and all but the records is there.
    wait_for_inputs(OVERLAP and ORDERS == 0)
    pair = tl.program_id(1)
    slot = tl.load(slot_ids + pair, volatile=ORDERS > 0)
    if slot >= 0:
        if ORDERS > 0:
            pool += wait_for_slot(order_slot, done, due, layer, slot, ORDERS, LANES)
        record = _record_of(pool, slot, stride)
        low = tl.multiple_of((record + LOW).to(tl.pointer_type(tl.int32)), 16)
        high = tl.multiple_of((record + HIGH).to(tl.pointer_type(tl.int32)), 16)
        norms = (record + NORMS).to(tl.pointer_type(tl.float16))
        codebook = (record + CODEBOOK).to(tl.pointer_type(tl.float32))
        x_row, y_row = x + (pair // k).to(tl.int64) * (BLOCKS * 128), y + pair.to(tl.int64) * outs
        begin = tl.program_id(0) * rows
        row_products(
            low, high, norms, codebook, x_row, y_row, y_row, begin, tl.minimum(begin + rows, outs),
            BITS, BLOCKS, SPAN, CHUNKS, AT_ONCE, False, ORDERS == 0,
        )  # fmt: skip
    wait_for_inputs(OVERLAP and ORDERS > 0)  # the next kernel must not overtake the copying


@triton.jit
def _raw_kernel(
    pool, slot_ids, x, y, outs, stride, k,
    COLUMNS: tl.constexpr, OFFSET: tl.constexpr, OUTS: tl.constexpr, WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    pair = tl.program_id(1)
    slot = tl.load(slot_ids + pair)
    if slot >= 0:
        record = _record_of(pool, slot, stride)
        weights = tl.multiple_of((record + OFFSET).to(tl.pointer_type(tl.bfloat16)), 16)
        out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
        row = tl.minimum(out, outs - 1)[:, None]
        total = tl.zeros([OUTS, WIDTH], tl.float32)
        for start in tl.static_range(0, COLUMNS, WIDTH):
            column = start + tl.arange(0, WIDTH)
            inside = column < COLUMNS
            values = tl.load(x + (pair // k).to(tl.int64) * COLUMNS + column, mask=inside, other=0.0).to(
                tl.float32
            )
            tile = tl.load(weights + row * COLUMNS + column[None, :], mask=inside[None, :], other=0.0)
            total += tile.to(tl.float32) * values[None, :]
        tl.store(y + pair.to(tl.int64) * outs + out, tl.sum(total, 1), mask=out < outs)


@triton.jit
def _combine_kernel(
    products, weights, shared, residual, hidden, slot_ids, posted, answered, heard, lane_products,
    K: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    column, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    inside = column < hidden
    total = tl.zeros([BLOCK], tl.float32)
    if LANE:
        rank = tl.arange(0, PAIRS)
        slots = tl.load(slot_ids + rank, mask=rank < K, other=0)
        if tl.min(slots, 0) == HANDED_OVER:
            wait_for_answer(posted, answered, heard)
    for rank in tl.static_range(K):
        place = (row * K + rank) * hidden + column
        product = tl.load(products + place, mask=inside, other=0.0)
        if LANE:  # noqa: SIM102, the compiler's if and the device's
            if tl.load(slot_ids + rank) == HANDED_OVER:
                product = tl.load(lane_products + place, mask=inside, other=0.0, cache_modifier=".cv")
        total += product * tl.load(weights + row * K + rank)
    place = row * hidden + column
    total += tl.load(shared + place, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + place, total.to(residual.dtype.element_ty), mask=inside)
