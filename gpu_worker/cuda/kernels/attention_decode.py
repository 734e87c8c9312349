"""Attention of one new token of each of a few sequences over its keys and values in the pools.

Flash decoding: the past is cut into shares, each a program's, and a second kernel puts the shares together.
Lengths are read on the device. A past is cut by its own length and nothing else, so a row's bits depend on
neither its neighbours nor the pools' size. Not done here: projections, prompts, positional encoding (there is
none).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.cuda.kernels.overlap import overlapping, wait_for_inputs
from gpu_worker.model.attention import attend_batch

_SPLITS = 64  # shares of a past: with two kv heads and 4,096 tokens, 128 programs of one block each
_BLOCK_BYTES = 128  # of each channel, keys and values alike: 32 KB a block of 128 channels
_STAGES = 3  # two blocks on their way at a time: 70 KB of shared memory, of the 99 KB that every GPU has


def attention_decode_plain(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, places: Tensor, positions: Tensor
) -> Tensor:
    """Row i is the token at positions[i] of places[i], both (b,) int64, no place twice.

    q (b, heads, d), k and v (b, kv heads, d), which enter keys and values (sequences, kv heads, max_context,
    d); all in one dtype. Returns (b, heads * d).
    """
    keys[places, :, positions] = k
    values[places, :, positions] = v
    return attend_batch(q, keys.index_select(0, places), values.index_select(0, places), positions + 1)


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, places: Tensor, positions: Tensor
) -> Tensor:
    """As `attention_decode_plain`; q, k and v may have any stride between rows, all else is contiguous."""
    (b, heads, d), (_, kv_heads, max_context, _) = q.shape, keys.shape
    partial = q.new_empty(b, heads, _SPLITS, d, dtype=torch.float32)
    log_sums = q.new_empty(b, heads, _SPLITS, dtype=torch.float32)
    y = q.new_empty(b, heads * d)
    shape = {
        "Q_STRIDE": q.stride(0), "K_STRIDE": k.stride(0), "V_STRIDE": v.stride(0), "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads, "DIM": d, "WIDTH": max(16, triton.next_power_of_2(d)),
        "SPLITS": _SPLITS, "BLOCK": _BLOCK_BYTES // q.element_size(),
        "SCALE": math.log2(math.e) * d**-0.5,  # exponentials are powers of 2 here, as in the hardware
        **overlapping(),
    }  # fmt: skip
    _share_kernel[(b, kv_heads, _SPLITS)](
        q, k, v, keys, values, places, positions, partial, log_sums,
        MAX_CONTEXT=max_context, MEMBERS=max(16, triton.next_power_of_2(heads // kv_heads)),
        INTERPRETED=not q.is_cuda, num_stages=_STAGES, **shape,
    )  # fmt: skip
    _combine_kernel[(b, heads)](q, k, v, positions, partial, log_sums, y, **shape)
    return y


@triton.jit
def _share_length(position, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """Positions a share of the `position` that came before: whole blocks."""
    blocks = (position + BLOCK - 1) // BLOCK
    return (blocks + SPLITS - 1) // SPLITS * BLOCK


@triton.jit
def _product(a, b, INTERPRETED: tl.constexpr):
    """a b, summed in float32. Triton's interpreter would multiply the bits of bfloat16 as integers."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _share_kernel(
    q, k, v, keys, values, places, positions, partial, log_sums,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    SCALE: tl.constexpr, MAX_CONTEXT: tl.constexpr, MEMBERS: tl.constexpr, INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place, position = tl.load(places + row), tl.load(positions + row).to(tl.int32)
    d = tl.arange(0, WIDTH)
    past = (place * KV_HEADS + kv_head) * MAX_CONTEXT * DIM
    if split == 0:
        # Nobody waits for this: shares end before `position`, and the token's own part comes from k and v.
        own = past + position * DIM + d
        tl.store(keys + own, tl.load(k + row * K_STRIDE + kv_head * DIM + d, mask=d < DIM), mask=d < DIM)
        tl.store(values + own, tl.load(v + row * V_STRIDE + kv_head * DIM + d, mask=d < DIM), mask=d < DIM)

    length = _share_length(position, BLOCK, SPLITS)
    start = split * length
    if start < position:
        member = tl.arange(0, MEMBERS)
        head = kv_head * GROUP + member
        present = (member < GROUP)[:, None] & (d < DIM)[None, :]
        query = tl.load(q + row * Q_STRIDE + head[:, None] * DIM + d[None, :], mask=present, other=0.0)
        best = tl.full([MEMBERS], float("-inf"), tl.float32)
        total = tl.zeros([MEMBERS], tl.float32)
        out = tl.zeros([MEMBERS, WIDTH], tl.float32)
        for first in range(start, tl.minimum(start + length, position), BLOCK):
            t = first + tl.arange(0, BLOCK)
            inside = (t < position)[:, None] & (d < DIM)[None, :]
            offsets = past + t[:, None] * DIM + d[None, :]
            key = tl.load(keys + offsets, mask=inside, other=0.0)
            value = tl.load(values + offsets, mask=inside, other=0.0)
            score = _product(query, tl.trans(key), INTERPRETED) * SCALE
            score = tl.where((t < position)[None, :], score, float("-inf"))
            new_best = tl.maximum(best, tl.max(score, 1))
            shrink = tl.exp2(best - new_best)
            weight = tl.exp2(score - new_best[:, None])
            total = total * shrink + tl.sum(weight, 1)
            out = out * shrink[:, None] + _product(weight.to(value.dtype), value, INTERPRETED)
            best = new_best
        at = (row * KV_HEADS * GROUP + head) * SPLITS + split
        tl.store(partial + at[:, None] * DIM + d[None, :], out / total[:, None], mask=present)
        tl.store(log_sums + at, best + tl.log2(total), mask=member < GROUP)


@triton.jit
def _combine_kernel(
    q, k, v, positions, partial, log_sums, y,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    SCALE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // GROUP
    d, split = tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    position = tl.load(positions + row).to(tl.int32)
    present = split * _share_length(position, BLOCK, SPLITS) < position
    at = (row * KV_HEADS * GROUP + head) * SPLITS + split
    log_sum = tl.load(log_sums + at, mask=present, other=float("-inf"))
    inside = present[:, None] & (d < DIM)[None, :]
    parts = tl.load(partial + at[:, None] * DIM + d[None, :], mask=inside, other=0.0)
    # The new token's own score and value are one more part, of one position.
    query = tl.load(q + row * Q_STRIDE + head * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    key = tl.load(k + row * K_STRIDE + kv_head * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    value = tl.load(v + row * V_STRIDE + kv_head * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    own_score = tl.sum(query * key, 0) * SCALE

    best = tl.maximum(own_score, tl.max(log_sum, 0))
    weight, own_weight = tl.exp2(log_sum - best), tl.exp2(own_score - best)
    out = tl.sum(weight[:, None] * parts, 0) + own_weight * value
    out = out / (tl.sum(weight, 0) + own_weight)
    tl.store(y + (row * KV_HEADS * GROUP + head) * DIM + d, out.to(y.dtype.element_ty), mask=d < DIM)
