"""The two normalisations of NemotronH, with transformers' order of rounding.

Statistics are float32 whatever comes in. The plain norm multiplies by its weight before it rounds to the
compute dtype, the gated one after: in float32 that is one and the same, in bfloat16 it decides the last bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_worker.kernels import small_steps


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x (..., hidden) over the root of its mean square, times weight (hidden,); in x.dtype."""
    if small_steps.usable(x, weight):
        return small_steps.rms_norm(x, weight, epsilon)
    return (weight.float() * _normalised(x.float(), epsilon)).to(x.dtype)


def added_norm(hidden: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """hidden + added (..., hidden), and the `rms_norm` of that; others may write the sum to `hidden`."""
    hidden = hidden + added
    return hidden, rms_norm(hidden, weight, epsilon)


def gated_group_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    """x * silu(gate), normalised in each of `groups` runs of the last axis, times weight; in x.dtype."""
    gated = torch.unflatten(x.float() * F.silu(gate.float()), -1, (groups, -1))
    return weight * _normalised(gated, epsilon).flatten(-2).to(x.dtype)


def _normalised(x: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
