"""One token of Mamba-2 for each of a few sequences: convolution, time step, state update, output.

What lies between the input projection and the gated norm, in two kernels. The first convolves and advances
the convolution's state, the second advances the recurrent state, which is nearly all of the traffic: 2 MB
read and 2 MB written a sequence and block at 64 heads x 64 channels x 128. Not done here: the gate and its
norm (`rotation`), prompts (chunked scan).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.model_config import ModelConfig
from gpu_worker.cuda.kernels.overlap import overlapping, wait_for_inputs
from gpu_worker.model.mamba2 import causal_conv, time_step
from gpu_worker.model.ssd import ssd_step
from gpu_worker.model.weights import Mamba2Weights

_CHANNELS = 64  # of the convolution a program: 96 programs a sequence
_PART = 16  # channels of a head a program: one sequence is 256 programs, more than any GPU's multiprocessors


def mamba2_step_plain(
    projected: Tensor, conv: Tensor, ssm: Tensor, places: Tensor, weights: Mamba2Weights, config: ModelConfig
) -> Tensor:
    """projected (b, gate + convolution inputs + dt) to y (b, intermediate) in its dtype, before the gate.

    conv (sequences, conv_dim, conv_kernel - 1) in projected.dtype and ssm (sequences, heads, head_dim, state)
    float32 advance at places (b,) int64, which are distinct.
    """
    inner, heads = config.mamba_intermediate_size, config.mamba_num_heads
    groups, state = config.n_groups, config.ssm_state_size
    _, xBC, dt = torch.split(projected, [inner, config.conv_dim, heads], dim=-1)
    window = conv.index_select(0, places)
    xBC, window = causal_conv(xBC[:, None], weights.conv1d_weight, weights.conv1d_bias, window)
    x, B, C = torch.split(xBC[:, 0], [inner, groups * state, groups * state], dim=-1)
    x = x.unflatten(-1, (heads, -1))
    B, C = (part.unflatten(-1, (groups, state)) for part in (B, C))
    dt = time_step(dt, weights.dt_bias, config.time_step_min)
    y, after = ssd_step(x, dt, weights.A, B, C, weights.D, ssm.index_select(0, places))
    conv.index_copy_(0, places, window)
    ssm.index_copy_(0, places, after)
    return y.flatten(1)


def mamba2_step(
    projected: Tensor, conv: Tensor, ssm: Tensor, places: Tensor, weights: Mamba2Weights, config: ModelConfig
) -> Tensor:
    """As `mamba2_step_plain`; projected may have any stride between rows, all else is contiguous."""
    b, inner, channels = projected.shape[0], config.mamba_intermediate_size, config.conv_dim
    heads, head_dim, state = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
    convolved, y = projected.new_empty(b, channels), projected.new_empty(b, inner)
    # A kernel of its own although 32 programs of the other read each of B and C: as the only one that touches
    # the convolution's state it may shift it in place. Were the others to convolve for themselves, the shift
    # would still have to wait for all of them, so there would be as many launches and more reads.
    _conv_kernel[(b, triton.cdiv(channels, _CHANNELS))](
        projected, conv, places, weights.conv1d_weight, weights.conv1d_bias, convolved,
        STRIDE=projected.stride(0), OFFSET=inner, CONV_DIM=channels, KERNEL=config.conv_kernel,
        CHANNELS=_CHANNELS, TAPS=triton.next_power_of_2(config.conv_kernel), num_warps=2,
        **overlapping(),
    )  # fmt: skip
    part = min(_PART, triton.next_power_of_2(head_dim))
    _state_kernel[(b, heads, triton.cdiv(head_dim, part))](
        projected, convolved, ssm, places, weights.dt_bias, weights.A, weights.D, y,
        STRIDE=projected.stride(0), TIME_STEP_MIN=config.time_step_min, HEADS=heads, HEAD_DIM=head_dim,
        GROUPS=config.n_groups, STATE=state, PART=part, STATE_WIDTH=triton.next_power_of_2(state),
        **overlapping(),
    )  # fmt: skip
    return y


@triton.jit
def _conv_kernel(
    projected, conv, places, weight, bias, convolved,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, CONV_DIM: tl.constexpr, KERNEL: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    row = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < CONV_DIM
    tap = tl.arange(0, TAPS)[None, :]
    place = tl.load(places + row)
    window = conv + (place * CONV_DIM + channel[:, None]) * (KERNEL - 1) + tap
    newest = tl.load(projected + row * STRIDE + OFFSET + channel, mask=inside, other=0.0)
    earlier = tl.load(window, mask=inside[:, None] & (tap < KERNEL - 1), other=0.0)
    inputs = tl.where(tap == KERNEL - 1, newest[:, None], earlier)
    within = inside[:, None] & (tap < KERNEL)
    taps = tl.load(weight + channel[:, None] * KERNEL + tap, mask=within, other=0.0)
    y = tl.zeros([CHANNELS], tl.float32)
    if bias is not None:
        y += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    y += tl.sum(inputs.to(tl.float32) * taps.to(tl.float32), 1)
    y = y / (1.0 + tl.exp(-y))
    tl.store(convolved + row * CONV_DIM + channel, y.to(convolved.dtype.element_ty), mask=inside)
    # A thread's input goes where another thread may read: not before all have read.
    tl.debug_barrier()
    tl.store(window - 1, inputs, mask=within & (tap > 0))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to float32's last digits: Triton lacks log1p, and 1 + e loses those of a small e."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)  # log(1 + e) = 2 artanh(s), whose series is fast for s <= 1/3
    q = s * s
    series = 1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + q * series)


@triton.jit
def _state_kernel(
    projected, convolved, ssm, places, dt_bias, A, D, y,
    STRIDE: tl.constexpr, TIME_STEP_MIN: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    GROUPS: tl.constexpr, STATE: tl.constexpr, PART: tl.constexpr, STATE_WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    row, head = tl.program_id(0), tl.program_id(1)
    p = tl.program_id(2) * PART + tl.arange(0, PART)
    n = tl.arange(0, STATE_WIDTH)
    in_head, in_state = p < HEAD_DIM, n < STATE
    inside = in_head[:, None] & in_state[None, :]
    # Loads before arithmetic: the compiler keeps their order, and so all wait for memory at once.
    place = tl.load(places + row)
    address = ssm + ((place * HEADS + head) * HEAD_DIM + p[:, None]) * STATE + n[None, :]
    state = tl.load(address, mask=inside, other=0.0)

    inner: tl.constexpr = HEADS * HEAD_DIM
    conv_dim: tl.constexpr = inner + 2 * GROUPS * STATE
    inputs = convolved + row * conv_dim
    group = head // (HEADS // GROUPS)
    x = tl.load(inputs + head * HEAD_DIM + p, mask=in_head, other=0.0).to(tl.float32)
    B = tl.load(inputs + inner + group * STATE + n, mask=in_state, other=0.0).to(tl.float32)
    C = tl.load(inputs + inner + (GROUPS + group) * STATE + n, mask=in_state, other=0.0).to(tl.float32)
    dt = tl.load(projected + row * STRIDE + inner + conv_dim + head).to(tl.float32)
    bias, rate, skip = tl.load(dt_bias + head), tl.load(A + head), tl.load(D + head)

    dt = softplus(dt + bias)
    dt = tl.where(dt < TIME_STEP_MIN, TIME_STEP_MIN, dt)  # unlike a maximum, keeps NaN
    state = state * tl.exp(dt * rate) + (x * dt)[:, None] * B[None, :]
    tl.store(address, state, mask=inside)
    out = tl.sum(state * C[None, :], 1) + x * skip
    tl.store(y + row * inner + head * HEAD_DIM + p, out.to(y.dtype.element_ty), mask=in_head)
