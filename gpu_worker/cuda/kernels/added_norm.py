"""The norm before a block of a prompt, with what the block before adds to the residual stream.

Bound by memory, and of short prompts by launches: PyTorch takes nine for it. Not done here: the norms of
decode steps, which also rotate (`rotation`), and the gated norm inside a Mamba-2 block (`mamba2_prompt`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def added_norm(hidden: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """As `gpu_worker.model.norms.added_norm`, of contiguous rows; the sum is written to `hidden`."""
    rows, columns = hidden.shape
    assert hidden.is_contiguous() and added.is_contiguous()
    normed = torch.empty_like(hidden)
    _added_norm_kernel[(rows,)](
        hidden, added, weight, normed, columns, epsilon, WIDTH=triton.next_power_of_2(columns), num_warps=4
    )
    return hidden, normed


@triton.jit
def _added_norm_kernel(hidden, added, weight, normed, columns, epsilon, WIDTH: tl.constexpr):
    column, row = tl.arange(0, WIDTH), tl.program_id(0).to(tl.int64) * columns
    inside = column < columns
    dtype: tl.constexpr = hidden.dtype.element_ty
    total = tl.load(hidden + row + column, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(added + row + column, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(dtype)
    tl.store(hidden + row + column, rounded, mask=inside)
    values = rounded.to(tl.float32)  # as the next block will read it
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / columns + epsilon)
    tl.store(normed + row + column, (gain * (values * scale)).to(dtype), mask=inside)
