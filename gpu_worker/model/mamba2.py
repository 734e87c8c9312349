"""A Mamba-2 block's mixer: project in, convolve, scan, normalise under the gate, project out.

Prefill and decode are one function over (b, t) tokens with states going in and coming out: prefill is one
sequence of t tokens, decode b sequences of one. The scan itself is in `ssd.py`, the states in `states.py`;
a GPU's kernels for prompts are handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.model_config import ModelConfig
from gpu_worker.kernels.mamba2_scan import Mamba2Kernel
from gpu_worker.model.norms import gated_group_norm
from gpu_worker.model.ssd import ssd_chunk_scan, ssd_step
from gpu_worker.model.states import PrefillStep, Step
from gpu_worker.model.weights import Mamba2Weights

Places = Tensor | slice  # of a batch's sequences in the pools

SCANNED_TOKENS = 1024  # at a time, where no kernel does it: PyTorch takes 200 KB for one of the 30B


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise convolution over time, then silu: x (b, t, channels), weight (channels, kernel).

    `state` (b, channels, kernel - 1) holds the inputs before x. Returns y like x, and the state after x.
    Computes in float32 and rounds once. Shifted products, unlike a library convolution, keep channels
    contiguous and cost next to nothing for a single token.
    """
    t = x.shape[1]
    window = torch.cat([state.transpose(1, 2), x], dim=1)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if bias is not None:
        y += bias
    for i, tap in enumerate(weight.float().unbind(1)):
        y.addcmul_(window[:, i : i + t].float(), tap)
    return F.silu(y).to(x.dtype), window[:, t:].transpose(1, 2)


def time_step(dt: Tensor, dt_bias: Tensor, time_step_min: float) -> Tensor:
    """softplus(dt + dt_bias) (..., heads) in float32, at least `time_step_min`.

    transformers clamps in its chunk form alone, so there a token's state depends on how it was computed.
    Here both forms share this rule, and decode continues exactly what prefill would have computed.
    """
    return F.softplus(dt.float() + dt_bias).clamp(min=time_step_min)


def scan_inputs(
    projected: Tensor, state: Tensor, weights: Mamba2Weights, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """What is scanned, of projected (b, t, gate + convolution inputs + dt) after the convolution's `state`.

    Returns x, B and C side by side (b, t, conv_dim) in projected.dtype, time steps (b, t, heads) float32, and
    the convolution's state after the last token.
    """
    inner, heads = config.mamba_intermediate_size, config.mamba_num_heads
    _, xBC, dt = torch.split(projected, [inner, config.conv_dim, heads], dim=-1)
    xBC, state = causal_conv(xBC, weights.conv1d_weight, weights.conv1d_bias, state)
    return xBC, time_step(dt, weights.dt_bias, config.time_step_min), state


@dataclass(frozen=True)
class MixerKernels:
    """What computes between the projections of a block: PyTorch, or others with its signatures."""

    inputs: Callable[..., tuple[Tensor, Tensor, Tensor]] = scan_inputs
    scan: Callable[..., tuple[Tensor, Tensor]] = ssd_chunk_scan
    norm: Callable[..., Tensor] = gated_group_norm
    tokens: int = SCANNED_TOKENS  # at a time


PLAIN_MIXER = MixerKernels()


class Mamba2:
    """The mixer of the `index`-th Mamba-2 block."""

    def __init__(
        self,
        weights: Mamba2Weights,
        config: ModelConfig,
        index: int,
        kernels: MixerKernels = PLAIN_MIXER,
    ) -> None:
        self.weights, self.config, self.index = weights, config, index
        self._kernels = kernels
        self._native = Mamba2Kernel(weights, config)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x (rows, hidden) to (rows, hidden); the step's states advance."""
        conv, ssm = step.pools.conv[self.index], step.pools.ssm[self.index]
        projected = self.weights.in_proj(x)
        places: Places
        if isinstance(step, PrefillStep):
            rows, places = projected[None], slice(step.sequence, step.sequence + 1)
        else:
            rows, places = projected[:, None], step.sequences
        scan = self._native if self._native.usable(rows, conv, ssm) else self.scan
        return self.weights.out_proj(scan(rows, conv, ssm, places).flatten(0, 1))

    def scan(self, projected: Tensor, conv: Tensor, ssm: Tensor, places: Places) -> Tensor:
        """The twin of Mamba2Kernel. Some tokens at a time: states go from one part to the next."""
        new_conv, new_ssm = conv[places], ssm[places]
        parts = []
        for part in projected.split(self._kernels.tokens, dim=1):
            y, new_conv, new_ssm = self.mix(part, new_conv, new_ssm)
            parts.append(y)
        conv[places], ssm[places] = new_conv, new_ssm
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def mix(self, projected: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What lies between the projections: projected (b, t, gate + convolution inputs + dt) after the given
        states to y (b, t, intermediate), and both states after it."""
        config, w = self.config, self.weights
        inner, heads, groups, state = (
            config.mamba_intermediate_size, config.mamba_num_heads, config.n_groups, config.ssm_state_size
        )  # fmt: skip
        xBC, dt, conv_state = self._kernels.inputs(projected, conv_state, w, config)
        x, B, C = torch.split(xBC, [inner, groups * state, groups * state], dim=-1)
        x = torch.unflatten(x, -1, (heads, config.mamba_head_dim))
        B, C = (torch.unflatten(part, -1, (groups, state)) for part in (B, C))
        y, ssm_state = self._scan(x, dt, B, C, ssm_state)
        gate = projected[..., :inner]
        y = self._kernels.norm(y.flatten(2), gate, w.norm, groups, config.layer_norm_epsilon)
        return y, conv_state, ssm_state

    def _scan(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        A, D = self.weights.A, self.weights.D
        if x.shape[1] > 1:
            return self._kernels.scan(x, dt, A, B, C, D, self.config.chunk_size, state)
        y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
        return y[:, None], state
