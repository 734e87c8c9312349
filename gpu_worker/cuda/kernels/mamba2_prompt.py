"""What lies on both sides of the scan of a prompt on the GPU: convolution and time steps, the gated norm.

Both are bound by memory: each reads the input projection's rows where they lie, once, and writes what comes
next reads, once. A token's bits depend on its own inputs alone, not on how many tokens a launch has or where
among them it stands. Not done here: the scan (`mamba2_chunks`), decode steps (`mamba2_step`, `rotation`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.model_config import ModelConfig
from gpu_worker.cuda.kernels.mamba2_step import softplus
from gpu_worker.model.weights import Mamba2Weights

_CHANNELS = 128  # of the convolution, a program of one warp: with eight a lane, loads wait for registers
_AT_ONCE = 8  # tokens whose inputs are loaded together
_ROWS = 64  # tokens a program: fewer read the taps more often, more leave multiprocessors idle
_NORM_ROWS = 2  # tokens a program of the norm, which is one warp: several would exchange their sums
TOKENS = 4096  # at a time: 45 KB each for one of the 30B


def scan_inputs(
    projected: Tensor, state: Tensor, weights: Mamba2Weights, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gpu_worker.model.mamba2.scan_inputs`; projected may have any stride but the last."""
    (b, t, _), channels, heads = projected.shape, config.conv_dim, config.mamba_num_heads
    assert projected.stride(2) == 1
    convolved = torch.empty(b, t, channels, dtype=projected.dtype, device=projected.device)
    steps = torch.empty(b, t, heads, dtype=torch.float32, device=projected.device)
    state = state.contiguous()
    after = torch.empty_like(state)
    _inputs_kernel[(triton.cdiv(channels, _CHANNELS) + 1, triton.cdiv(t, _ROWS), b)](
        projected, state, weights.conv1d_weight, weights.conv1d_bias, weights.dt_bias,
        convolved, steps, after, t, *projected.stride()[:2], TIME_STEP_MIN=config.time_step_min,
        INNER=config.mamba_intermediate_size, CONV_DIM=channels, HEADS=heads, KERNEL=config.conv_kernel,
        CHANNELS=_CHANNELS, ROWS=_ROWS, AT_ONCE=_AT_ONCE, PADDED_HEADS=triton.next_power_of_2(heads),
        num_warps=1,
    )  # fmt: skip
    return convolved, steps, after


def gated_group_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    """As `gpu_worker.model.norms.gated_group_norm`, of (b, t, columns) with any strides but the last."""
    b, t, columns = x.shape
    assert x.stride(2) == gate.stride(2) == 1
    y = torch.empty(b, t, columns, dtype=x.dtype, device=x.device)
    group = columns // groups
    _norm_kernel[(groups, triton.cdiv(t, _NORM_ROWS), b)](
        x, gate, weight, y, t, *x.stride()[:2], *gate.stride()[:2], epsilon,
        GROUP=group, WIDTH=triton.next_power_of_2(group), ROWS=_NORM_ROWS, num_warps=1,
    )  # fmt: skip
    return y


_LOG2_E = tl.constexpr(1.4426950408889634)


# Not specialised on lengths: each of their kinds would be a kernel of its own, compiled when first met.
@triton.jit(do_not_specialize=["tokens"])
def _inputs_kernel(
    projected, state, weight, bias, dt_bias, convolved, steps, after, tokens, batch_stride, token_stride,
    TIME_STEP_MIN: tl.constexpr, INNER: tl.constexpr, CONV_DIM: tl.constexpr, HEADS: tl.constexpr,
    KERNEL: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
):  # fmt: skip
    """Some tokens of some channels; the last programs of each row take the time steps of all heads."""
    part, first, batch = tl.program_id(0), tl.program_id(1) * ROWS, tl.program_id(2).to(tl.int64)
    inputs = projected + batch * batch_stride + INNER
    if part == tl.num_programs(0) - 1:
        _time_steps(
            inputs + CONV_DIM, dt_bias, steps + batch * tokens * HEADS, first, tokens, token_stride,
            TIME_STEP_MIN, HEADS, PADDED_HEADS, ROWS, AT_ONCE,
        )  # fmt: skip
    else:
        own_state = batch * (CONV_DIM * (KERNEL - 1))
        _convolve(
            inputs, state + own_state, weight, bias, convolved + batch * tokens * CONV_DIM, after + own_state,
            part * CHANNELS + tl.arange(0, CHANNELS), first, tokens, token_stride,
            CONV_DIM, KERNEL, ROWS, AT_ONCE,
        )  # fmt: skip


@triton.jit
def _time_steps(
    dt, dt_bias, steps, first, tokens, token_stride,
    TIME_STEP_MIN: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, PADDED_HEADS)[None, :]
    bias = tl.load(dt_bias + head, mask=head < HEADS, other=0.0)
    for done in range(0, tl.minimum(ROWS, tokens - first), AT_ONCE):
        row = (first + done + tl.arange(0, AT_ONCE))[:, None]
        inside = (row < tokens) & (head < HEADS)
        step = tl.load(dt + row.to(tl.int64) * token_stride + head, mask=inside, other=0.0).to(tl.float32)
        step = softplus(step + bias)
        step = tl.where(step < TIME_STEP_MIN, TIME_STEP_MIN, step)  # unlike a maximum, keeps NaN
        tl.store(steps + row.to(tl.int64) * HEADS + head, step, mask=inside)


@triton.jit
def _convolve(
    inputs, state, weight, bias, convolved, after, channel, first, tokens, token_stride,
    CONV_DIM: tl.constexpr, KERNEL: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    inside = channel < CONV_DIM
    taps = ()
    for tap in tl.static_range(KERNEL):
        found = tl.load(weight + channel * KERNEL + tap, mask=inside, other=0.0)
        taps += (found.to(tl.float32),)  # type: ignore[assignment]
    offset = tl.zeros(channel.shape, tl.float32)
    if bias is not None:
        offset += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    earlier = ()
    for i in tl.static_range(KERNEL - 1):
        found = _input(inputs, state, first + i - (KERNEL - 1), channel, token_stride, CONV_DIM, KERNEL)
        earlier += (found,)  # type: ignore[assignment]
    for done in range(0, tl.minimum(ROWS, tokens - first), AT_ONCE):
        start = first + done
        # All loads before the first store, which the compiler lets no load pass.
        window = earlier
        for i in tl.static_range(AT_ONCE):
            place = inputs + (start + i).to(tl.int64) * token_stride
            found = tl.load(place + channel, mask=channel < _limit(start + i < tokens, CONV_DIM), other=0.0)
            window += (found,)  # type: ignore[assignment]
        for i in tl.static_range(AT_ONCE):
            y = offset
            for tap in tl.static_range(KERNEL):
                y = tl.fma(window[i + tap].to(tl.float32), taps[tap], y)
            y = _silu(y).to(convolved.dtype.element_ty)
            place = convolved + (start + i).to(tl.int64) * CONV_DIM
            tl.store(place + channel, y, mask=channel < _limit(start + i < tokens, CONV_DIM))
        earlier = window[AT_ONCE:]  # type: ignore[assignment]
    if first + ROWS >= tokens:
        for i in tl.static_range(KERNEL - 1):
            row = tokens - (KERNEL - 1) + i
            last = _input(inputs, state, row, channel, token_stride, CONV_DIM, KERNEL)
            tl.store(after + channel * (KERNEL - 1) + i, last, mask=inside)


@triton.jit
def _input(inputs, state, row, channel, token_stride, CONV_DIM: tl.constexpr, KERNEL: tl.constexpr):
    """Of any row; those before the first are the state's."""
    place = inputs + row.to(tl.int64) * token_stride
    found = tl.load(place + channel, mask=channel < _limit(row >= 0, CONV_DIM), other=0.0)
    place = state + channel * (KERNEL - 1) + (row + KERNEL - 1)
    return tl.where(row < 0, tl.load(place, mask=channel < _limit(row < 0, CONV_DIM), other=0.0), found)


@triton.jit
def _limit(condition, CONV_DIM: tl.constexpr):
    """Of channels. As a number: Triton's interpreter makes no mask of a block's and a single condition."""
    return tl.where(condition, CONV_DIM, 0)


@triton.jit
def _silu(x):
    """By exp2, which unlike exp is one instruction."""
    return x / (1.0 + tl.exp2(x * -_LOG2_E))


@triton.jit(do_not_specialize=["tokens"])
def _norm_kernel(
    x, gate, weight, y, tokens, x_batch, x_token, gate_batch, gate_token, epsilon,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    group, groups, batch = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    place = tl.arange(0, WIDTH)[None, :]
    column, inside = group * GROUP + place, (row < tokens) & (place < GROUP)
    values = tl.load(x + batch * x_batch + row * x_token + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + batch * gate_batch + row * gate_token + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=place < GROUP, other=0.0).to(tl.float32)
    values *= _silu(g)
    scaled = values * tl.rsqrt(tl.sum(values * values, 1) / GROUP + epsilon)[:, None]
    # transformers' order of rounding: to the compute dtype, then times the weight, and rounded again.
    dtype: tl.constexpr = y.dtype.element_ty
    rounded = (gain * scaled.to(dtype).to(tl.float32)).to(dtype)
    tl.store(y + (batch * tokens + row) * (groups * GROUP) + column, rounded, mask=inside)
