"""Copying ahead: one expert a layer, which the next step of the layer will probably choose.

`reserve` takes a slot for the first of the predicted experts that is absent, as the policy would at a miss,
and `fetch_ahead` copies the record there until it is told to stop: by `slots.resolve`, once the layer's
choice is known and the expert is not in it. So a wrong guess moves bytes only while nobody else wants the
link, and costs a slot that the next miss would have taken. Not done here: predicting, and what becomes of an
expert that is chosen (`slots.resolve`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.cuda.kernels.overlap import overlapping, wait_for_inputs
from gpu_worker.cuda.kernels.slots import (
    ABSENT,
    PROGRAMS,
    Awaited,
    Directory,
    copy_record,
    deciding,
    slots_to_fill,
    turns,
    worth,
)

_BLOCK = tl.constexpr(4096)  # int32 words that a program copies before it looks whether to stop


def reserve_plain(
    choices: Tensor,
    layer: int,
    policy: str,
    directory: Directory,
    awaited: Awaited,
    frame_of: Tensor,
    enabled: Tensor,
) -> None:
    """Await the first absent expert of choices (rows, k) int64, best first, if there is a slot for it.

    Slots of the other predicted experts stay. frame_of (layers, experts) int32; nothing is awaited where
    enabled (1,) int32 is 0.
    """
    predicted = choices.flatten().tolist()
    slot_of, expert_of = directory.slot_of[layer], directory.expert_of[layer]
    awaited.expert[layer] = awaited.frame[layer] = ABSENT
    awaited.stop[layer] = 0
    absent = [expert for expert in predicted if slot_of[expert] == ABSENT]
    if not absent or not int(enabled):
        return
    kept = {int(slot_of[expert]) for expert in predicted} - {ABSENT}
    for slot in slots_to_fill(layer, policy, directory, int(directory.clock[layer]) + 1, kept, 1):
        if expert_of[slot] != ABSENT:
            slot_of[expert_of[slot]] = ABSENT
        expert_of[slot], directory.uses[layer, slot] = ABSENT, 0
        awaited.expert[layer], awaited.slot[layer] = absent[0], slot
        awaited.frame[layer] = frame_of[layer, absent[0]]
        awaited.counters[layer, 0] += 1


def reserve(
    choices: Tensor,
    layer: int,
    policy: str,
    directory: Directory,
    awaited: Awaited,
    frame_of: Tensor,
    enabled: Tensor,
) -> None:
    """As `reserve_plain`, in one program; 128 pairs at most."""
    arguments = (choices, layer, *directory[:5], *awaited, frame_of, enabled)
    _reserve_kernel[(1,)](*arguments, **deciding(choices, directory, policy))


def fetch_ahead_plain(
    layer: int, awaited: Awaited, arena_base: Tensor, pool: Tensor, blocks: int = PROGRAMS
) -> None:
    """Copy the awaited record of a layer to its slot, unless it was given up; see `slots.fetch_plain`."""
    frame, slot = int(awaited.frame[layer]), int(awaited.slot[layer])
    if frame != ABSENT and not int(awaited.stop[layer]):
        copy_record(arena_base, frame, pool[layer, slot])
        awaited.counters[layer, 2] += pool.shape[2]


def fetch_ahead(
    layer: int, awaited: Awaited, arena_base: Tensor, pool: Tensor, blocks: int = PROGRAMS
) -> None:
    """As `fetch_ahead_plain`; looks again and again whether to go on."""
    _, slots, stride = pool.shape
    _fetch_ahead_kernel[(blocks,)](
        layer, *awaited[1:], arena_base, pool.view(torch.int32),
        SLOTS=slots, WORDS=stride // 4, PROGRAMS=blocks, num_warps=8, **overlapping(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer"])
def _reserve_kernel(
    choices, layer, slot_of, expert_of, last_used, uses, clock,
    awaited_expert, awaited_slot, awaited_frame, awaited_stop, counters, frame_of, enabled,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, PAIRS: tl.constexpr, PADDED_SLOTS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr, FREQUENCY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    pair, slot = tl.arange(0, PADDED_PAIRS), tl.arange(0, PADDED_SLOTS)
    chosen, exists = pair < PAIRS, slot < SLOTS
    slot_of += layer * EXPERTS
    expert_of += layer * SLOTS
    uses += layer * SLOTS
    counters += layer * 3

    expert = tl.load(choices + pair, mask=chosen, other=EXPERTS).to(tl.int32)
    place = tl.load(slot_of + expert, mask=chosen, other=0)
    resident = tl.load(expert_of + slot, mask=exists, other=-1)
    recency = tl.load(last_used + layer * SLOTS + slot, mask=exists, other=0)
    frequency = tl.load(uses + slot, mask=exists, other=0)
    now = tl.load(clock + layer) + 1
    made_before, on = tl.load(counters), tl.load(enabled)

    first = tl.min(tl.where(chosen & (place < 0), pair, PADDED_PAIRS), 0)
    wanted = tl.sum(tl.where(pair == first, expert, 0), 0)
    frame = tl.load(frame_of + layer * EXPERTS + wanted)
    kept = tl.sum((chosen[:, None] & (place[:, None] == slot[None, :])).to(tl.int32), 0) > 0
    may_go = exists & ~kept
    numerator, denominator = worth(recency, frequency, now, resident < 0, FREQUENCY)
    turn = turns(may_go, numerator, denominator, slot)
    # There is no turn SLOTS: where nothing is wanted, no slot is taken.
    taken = may_go & (turn == tl.where((first < PADDED_PAIRS) & (on != 0), 0, SLOTS))
    its_slot = tl.max(tl.where(taken, slot, -1), 0)

    # Threads store what others have loaded above: no store may overtake a load.
    tl.debug_barrier()
    tl.store(slot_of + resident, -1, mask=taken & (resident >= 0))
    tl.store(expert_of + slot, -1, mask=taken)
    tl.store(uses + slot, 0, mask=taken)
    tl.store(awaited_expert + layer, tl.where(its_slot >= 0, wanted, -1))
    tl.store(awaited_slot + layer, its_slot, mask=its_slot >= 0)
    tl.store(awaited_frame + layer, tl.where(its_slot >= 0, frame, -1))
    tl.store(awaited_stop + layer, 0)
    tl.store(counters, made_before + 1, mask=its_slot >= 0)


@triton.jit(do_not_specialize=["layer"])
def _fetch_ahead_kernel(
    layer, awaited_slot, awaited_frame, stop, counters, arena_base, pool,
    SLOTS: tl.constexpr, WORDS: tl.constexpr, PROGRAMS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    frame, slot = tl.load(awaited_frame + layer).to(tl.int64), tl.load(awaited_slot + layer).to(tl.int64)
    if frame >= 0:
        address = tl.load(arena_base) + frame * (WORDS * 4)
        source = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)  # as in `slots._fetch_kernel`
        target = pool + (layer.to(tl.int64) * SLOTS + slot) * WORDS
        start = tl.program_id(0) * _BLOCK
        copied = tl.zeros([], tl.int64)
        while (start < WORDS) & (tl.load(stop + layer, volatile=True) == 0):
            word = start + tl.arange(0, _BLOCK)
            inside = word < WORDS
            tl.store(target + word, tl.load(source + word, mask=inside), mask=inside)
            copied += tl.minimum(_BLOCK, WORDS - start) * 4
            start += PROGRAMS * _BLOCK
        tl.atomic_add(counters + layer * 3 + 2, copied)
