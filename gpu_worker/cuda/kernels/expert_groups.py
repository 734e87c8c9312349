"""Who chose whom, of a prompt: the pairs of rows and experts, sorted by expert.

A sort by counting, in one launch: a program for each expert counts the pairs that come before its own, and
then places these. Not done here: choosing (`router`), computing the groups (`grouped_product`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.cuda.kernels.packed_words import INTERPRETED

_PAIRS = 256 if INTERPRETED else 2048  # at a time


def expert_groups_plain(choices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """choices (rows, k) int64 in [0, experts) to positions (rows * k,) int64 and starts (experts + 1,) int32.

    The pairs that chose expert e are positions[starts[e] : starts[e + 1]], in ascending order.
    """
    chosen, positions = choices.flatten().sort(stable=True)
    starts = torch.searchsorted(chosen, torch.arange(experts + 1, device=chosen.device))
    return positions, starts.int()


def expert_groups(choices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """As `expert_groups_plain`, for contiguous choices."""
    assert choices.is_contiguous()
    positions = torch.empty(choices.numel(), dtype=torch.int64, device=choices.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=choices.device)
    _groups_kernel[(experts,)](choices, positions, starts, choices.numel(), PAIRS=_PAIRS, num_warps=4)
    return positions, starts


@triton.jit(do_not_specialize=["pairs"])
def _groups_kernel(choices, positions, starts, pairs, PAIRS: tl.constexpr):
    expert, experts = tl.program_id(0), tl.num_programs(0)
    earlier = tl.zeros([PAIRS], tl.int32)
    for first in tl.range(0, pairs, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        chosen = tl.load(choices + pair, mask=pair < pairs, other=experts)
        earlier += (chosen < expert).to(tl.int32)
    place = tl.sum(earlier, 0)
    tl.store(starts + expert, place)
    for first in tl.range(0, pairs, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        chosen = tl.load(choices + pair, mask=pair < pairs, other=experts)
        mine = (chosen == expert).to(tl.int32)
        where = place + tl.cumsum(mine, 0) - mine
        tl.store(positions + where, pair.to(tl.int64), mask=mine > 0)
        place += tl.sum(mine, 0)
    if expert == experts - 1:
        tl.store(starts + experts, place)
