"""Mamba-2's chunk scan on the GPU: `gpu_worker.model.ssd.ssd_chunk_scan` without its large intermediates.

The same matmul form (arXiv:2405.21060), in three kernels: what each chunk adds to the state, the state
carried from chunk to chunk, and the outputs. Between them only the running sum of log decays and a state a
chunk lie in memory. For bfloat16 tensor cores take float32 factors at tf32's 11 bits; for float32 they are
exact. Not done here: what lies before and after the scan, decode steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.cuda.kernels.packed_words import INTERPRETED, tile_dot

_ROWS = 64  # outputs of a chunk that a program computes
_STATES = 1024  # entries of a head's state that a program carries


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `ssd_chunk_scan`; of x, B and C (one dtype) all but the last two dimensions may have any stride."""
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    chunks = triton.cdiv(t, chunk_size)
    shape = {
        "HEADS": h, "GROUPS": g, "P": p, "N": n, "LENGTH": chunk_size,
        "PADDED_P": _padded(p), "PADDED_N": _padded(n), "PADDED_LENGTH": _padded(chunk_size),
    }  # fmt: skip
    exact = {"PRECISION": "tf32" if x.dtype is torch.bfloat16 and not INTERPRETED else "ieee"}
    strides = (*x.stride()[:2], *B.stride()[:2])
    assert C.stride() == B.stride() and x.stride()[2:] == (p, 1) and B.stride()[2:] == (n, 1)
    dt, A, D = dt.float().contiguous(), A.float(), D.float()
    log_decay = torch.empty(b, chunks, h, chunk_size, dtype=torch.float64, device=x.device)
    states = torch.empty(b, chunks, h, p, n, device=x.device)
    _added_kernel[(chunks, h, b)](x, dt, A, B, log_decay, states, t, *strides, **shape, **exact)
    last = torch.empty(b, h, p, n, device=x.device)
    initial = last if initial_state is None else initial_state.float().contiguous()
    _carry_kernel[(h, triton.cdiv(p * n, _STATES), b)](
        log_decay, states, initial, last, chunks,
        HEADS=h, SIZE=p * n, LENGTH=chunk_size, BLOCK=_STATES, GIVEN=initial_state is not None,
    )  # fmt: skip
    y = torch.empty(b, t, h, p, dtype=x.dtype, device=x.device)
    rows = min(_ROWS, _padded(chunk_size))
    _output_kernel[(chunks, triton.cdiv(chunk_size, rows), b * h)](
        x, dt, B, C, D, log_decay, states, y, t, *strides, **shape, **exact, ROWS=rows
    )
    return y, last


def _padded(size: int) -> int:
    """Of a dimension of a product: tensor cores take no less."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def _added_kernel(
    x, dt, A, B, log_decay, states, tokens, x_batch, x_token, b_batch, b_token,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, LENGTH: tl.constexpr,
    PADDED_P: tl.constexpr, PADDED_N: tl.constexpr, PADDED_LENGTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place, p, n = tl.arange(0, PADDED_LENGTH), tl.arange(0, PADDED_P), tl.arange(0, PADDED_N)
    token = (chunk * LENGTH + place).to(tl.int64)
    inside = (place < LENGTH) & (token < tokens)
    step = tl.load(dt + (batch * tokens + token) * HEADS + head, mask=inside, other=0.0)
    # Summed in float64: decays are exp of differences of these sums, see `ssd_chunk_scan`. After the last
    # token steps count 0: decay 1 and no input.
    log = tl.cumsum(step.to(tl.float64) * tl.load(A + head).to(tl.float64), 0)
    row = (batch * tl.num_programs(0) + chunk) * HEADS + head
    tl.store(log_decay + row * LENGTH + place, log, mask=place < LENGTH)
    whole = tl.sum(tl.where(place == LENGTH - 1, log, 0.0), 0)
    weight = step * tl.exp((whole - log).to(tl.float32))
    inputs = tl.load(
        x + batch * x_batch + token[:, None] * x_token + head * P + p[None, :],
        mask=inside[:, None] & (p < P)[None, :], other=0.0,
    )  # fmt: skip
    keys = tl.load(
        B + batch * b_batch + token[:, None] * b_token + head // (HEADS // GROUPS) * N + n[None, :],
        mask=inside[:, None] & (n < N)[None, :], other=0.0,
    )  # fmt: skip
    weighted = tl.trans(inputs.to(tl.float32) * weight[:, None])
    added = tl.dot(weighted, keys.to(tl.float32), input_precision=PRECISION)
    where = row * (P * N) + p[:, None] * N + n[None, :]
    tl.store(states + where, added, mask=(p < P)[:, None] & (n < N)[None, :])


@triton.jit
def _carry_kernel(
    log_decay, states, initial, last, chunks,
    HEADS: tl.constexpr, SIZE: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """What each chunk adds becomes the state before it."""
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, of_head = entry < SIZE, (batch * HEADS + head) * SIZE
    state = tl.zeros([BLOCK], tl.float32)
    if GIVEN:
        state = tl.load(initial + of_head + entry, mask=inside, other=0.0)
    for chunk in tl.range(0, chunks):
        row = (batch * chunks + chunk) * HEADS + head
        added = tl.load(states + row * SIZE + entry, mask=inside, other=0.0)
        tl.store(states + row * SIZE + entry, state, mask=inside)
        state = state * tl.exp(tl.load(log_decay + row * LENGTH + LENGTH - 1).to(tl.float32)) + added
    tl.store(last + of_head + entry, state, mask=inside)


@triton.jit
def _output_kernel(
    x, dt, B, C, D, log_decay, states, y, tokens, x_batch, x_token, b_batch, b_token,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, LENGTH: tl.constexpr,
    PADDED_P: tl.constexpr, PADDED_N: tl.constexpr, PADDED_LENGTH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    chunk, head, batch = tl.program_id(0), tl.program_id(2) % HEADS, (tl.program_id(2) // HEADS).to(tl.int64)
    place, p, n = tl.arange(0, PADDED_LENGTH), tl.arange(0, PADDED_P), tl.arange(0, PADDED_N)
    mine = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token, my_token = (chunk * LENGTH + place).to(tl.int64), (chunk * LENGTH + mine).to(tl.int64)
    inside, my_inside = (place < LENGTH) & (token < tokens), (mine < LENGTH) & (my_token < tokens)
    in_p, in_n = (p < P)[None, :], (n < N)[None, :]
    row = (batch * tl.num_programs(0) + chunk) * HEADS + head
    group = head // (HEADS // GROUPS) * N + n[None, :]
    keys = tl.load(
        B + batch * b_batch + token[:, None] * b_token + group, mask=inside[:, None] & in_n, other=0.0
    )
    queries = tl.load(
        C + batch * b_batch + my_token[:, None] * b_token + group, mask=my_inside[:, None] & in_n, other=0.0
    )
    inputs = tl.load(
        x + batch * x_batch + token[:, None] * x_token + head * P + p[None, :],
        mask=inside[:, None] & in_p, other=0.0,
    )  # fmt: skip
    steps = tl.load(dt + (batch * tokens + token) * HEADS + head, mask=inside, other=0.0)
    log = tl.load(log_decay + row * LENGTH + place, mask=place < LENGTH, other=0.0)
    my_log = tl.load(log_decay + row * LENGTH + mine, mask=mine < LENGTH, other=0.0)
    start = tl.load(
        states + row * (P * N) + p[:, None] * N + n[None, :], mask=(p < P)[:, None] & in_n, other=0.0
    )

    scores = tile_dot(queries, tl.trans(keys), tl.zeros([ROWS, PADDED_LENGTH], tl.float32))
    # Masked before exp, which above the diagonal might overflow.
    between = tl.where(
        mine[:, None] >= place[None, :], (my_log[:, None] - log[None, :]).to(tl.float32), float("-inf")
    )
    scores = scores * tl.exp(between) * steps[None, :]
    carried = tl.dot(queries.to(tl.float32), tl.trans(start), input_precision=PRECISION)
    out = carried * tl.exp(my_log.to(tl.float32))[:, None]
    out = tl.dot(scores, inputs.to(tl.float32), out, input_precision=PRECISION)
    where = head * P + p[None, :]
    own = tl.load(
        x + batch * x_batch + my_token[:, None] * x_token + where, mask=my_inside[:, None] & in_p, other=0.0
    )
    out += own.to(tl.float32) * tl.load(D + head)
    tl.store(
        y + (batch * tokens + my_token[:, None]) * (HEADS * P) + where,
        out.to(y.dtype.element_ty), mask=my_inside[:, None] & in_p,
    )  # fmt: skip
