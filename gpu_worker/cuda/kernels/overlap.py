"""A kernel starts up while the one before it ends: programmatic dependent launch, on GPUs that have it.

A decode step is some four hundred short kernels in a row, so what starting up costs adds up. Launched this
way a kernel is set up when the last program before it ends. It starts yet earlier, to run beside the one
before, only where that waits for something that not all need: everywhere else that was slower, measured on an
H100.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.packed_words import INTERPRETED


@cache
def overlapping() -> dict[str, Any]:
    """For the launch of a kernel that calls `wait_for_inputs`: its constant OVERLAP, and Triton's option."""
    able = not INTERPRETED and torch.cuda.get_device_capability() >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if able else {"OVERLAP": False}


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """From here on all that earlier kernels have written is there: nothing may be read or written before, but
    for what `let_next_begin` says."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """The next kernel may start once every program has come here, and then sees all that these had as inputs.

    What this kernel writes it sees only by what both agree on, until it too waits for its inputs.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
