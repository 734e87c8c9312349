"""The slot cache's two kernels: look-up with the choice of victims, and the copy of what is missing.

`resolve` takes the decisions of `gpu_worker.slots.cache` for a step whose experts all fit, and leaves a list
of misses that `fetch` works off. A policy orders all slots that may go before the step changes any of them,
so every miss knows its slot by its rank alone, and nothing is done one after the other. The tensors belong
to `gpu_worker.cuda.device_slots`. Not done here: predicting what to copy ahead (`prefetch`), steps that need
more experts than there are slots, experts without a frame.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.cuda.kernels.overlap import overlapping, wait_for_inputs
from gpu_worker.cuda.kernels.packed_words import INTERPRETED
from gpu_worker.slots.policies import POLICIES, Usage

ABSENT = -1
# Of `fetch`: more were not faster on an H100, and these leave most multiprocessors alone.
PROGRAMS = 2 if INTERPRETED else 16
_BLOCK = tl.constexpr(4096)  # int32 words that a program of `fetch` has in one load


class Directory(NamedTuple):
    """Which expert lies where, and what the policies know of it; int32 but for `counters` (int64)."""

    slot_of: Tensor  # (layers, experts), -1 when absent
    expert_of: Tensor  # (layers, slots), -1 when free
    last_used: Tensor  # (layers, slots), the clock at the last use
    uses: Tensor  # (layers, slots), since the expert came
    clock: Tensor  # (layers,), steps
    counters: Tensor  # (layers, 2), hits and misses, each expert counted once a step


class Misses(NamedTuple):
    """What `fetch` has to copy; int32. Entries from `length` on are left over from other steps."""

    length: Tensor  # (1,)
    frames: Tensor  # (max_pairs,), where the record is in the arena
    slots: Tensor  # (max_pairs,), where it goes


class Awaited(NamedTuple):
    """At most one expert a layer that is being copied ahead of its choice, by `prefetch`; int32."""

    expert: Tensor  # (layers,), -1 when none is awaited
    slot: Tensor  # (layers,), where its record goes; free in the directory until the expert is chosen
    frame: Tensor  # (layers,), where it comes from; -1: nothing to copy
    stop: Tensor  # (layers,), 1 once it was not chosen: copying on is in vain
    counters: Tensor  # (layers, 3) int64: experts awaited, chosen; bytes copied


def resolve_plain(
    choices: Tensor,
    layer: int,
    policy: str,
    directory: Directory,
    awaited: Awaited,
    frame_of: Tensor,
    slot_ids: Tensor,
    misses: Misses,
) -> None:
    """Find or make room for every expert of choices (rows, k) int64, contiguous, 128 pairs at most.

    Writes slot_ids[row * k + rank], the layer's row of `directory`, and `misses` in ascending order of
    experts, with frames from frame_of (layers, experts) int32. An awaited expert that is chosen counts as
    found where it is going, one that is not is given up. The different experts must fit the slots; slot_ids
    says -1 for one that does not.
    """
    needed = sorted(set(choices.flatten().tolist()))
    slot_of, expert_of = directory.slot_of[layer], directory.expert_of[layer]
    _settle_awaited(layer, directory, awaited, needed)
    absent = [expert for expert in needed if slot_of[expert] == ABSENT]
    places = [int(slot_of[expert]) for expert in needed if slot_of[expert] != ABSENT]
    directory.clock[layer] += 1
    directory.counters[layer] += torch.tensor([len(places), len(absent)]).to(directory.counters)
    directory.last_used[layer, places] = directory.clock[layer]
    directory.uses[layer, places] += 1
    clock = int(directory.clock[layer])
    filled = slots_to_fill(layer, policy, directory, clock, set(places), len(absent))
    for expert, slot in zip(absent, filled, strict=False):
        if expert_of[slot] != ABSENT:
            slot_of[expert_of[slot]] = ABSENT
        slot_of[expert], expert_of[slot] = slot, expert
    directory.last_used[layer, filled] = directory.clock[layer]
    directory.uses[layer, filled] = 1
    misses.length.fill_(len(filled))
    misses.frames[: len(filled)] = frame_of[layer, absent[: len(filled)]]
    misses.slots[: len(filled)] = torch.tensor(filled, dtype=torch.int32)
    slot_ids[: choices.numel()] = slot_of[choices.flatten()]


def resolve(
    choices: Tensor,
    layer: int,
    policy: str,
    directory: Directory,
    awaited: Awaited,
    frame_of: Tensor,
    slot_ids: Tensor,
    misses: Misses,
) -> None:
    """As `resolve_plain`, in one program."""
    _resolve_kernel[(1,)](
        choices,
        layer,
        *directory,
        awaited.expert,
        awaited.slot,
        awaited.stop,
        awaited.counters,
        frame_of,
        slot_ids,
        *misses,
        **deciding(choices, directory, policy),
    )


def deciding(choices: Tensor, directory: Directory, policy: str) -> dict[str, Any]:
    """The launch of a kernel that looks choices up in a layer and chooses victims by `worth` and `turns`."""
    slots, pairs = directory.expert_of.shape[1], choices.numel()
    padded_slots, padded_pairs = (triton.next_power_of_2(max(8, count)) for count in (slots, pairs))
    return {
        "EXPERTS": directory.slot_of.shape[1], "SLOTS": slots, "PAIRS": pairs, "PADDED_SLOTS": padded_slots,
        "PADDED_PAIRS": padded_pairs, "FREQUENCY": policy == "lfru", **overlapping(),
        # Slots are compared each with each, and so are pairs: one warp while 32 comparisons a thread will do.
        "num_warps": min(8, max(1, max(padded_slots, padded_pairs) ** 2 // 1024)),
    }  # fmt: skip


def fetch_plain(layer: int, misses: Misses, arena_base: Tensor, pool: Tensor, blocks: int = PROGRAMS) -> None:
    """Copy the records of `misses` from the arena to the slots of pool (layers, slots, stride) uint8.

    arena_base (1,) int64 is the device's address of frame 0; frames lie a stride apart, a multiple of 4096.
    (The twin reads by the same address on the host, which is what unified addressing makes of it.) `blocks`
    is the number of programs, however many misses there are.
    """
    length = int(misses.length)
    for frame, slot in zip(misses.frames[:length].tolist(), misses.slots[:length].tolist(), strict=True):
        copy_record(arena_base, frame, pool[layer, slot])


def copy_record(arena_base: Tensor, frame: int, slot: Tensor) -> None:
    """Plain: the record of `frame`, a stride after another from the host's address arena_base on, to slot."""
    stride = slot.shape[0]
    record = (ctypes.c_uint8 * stride).from_address(int(arena_base) + frame * stride)
    slot.copy_(torch.frombuffer(record, dtype=torch.uint8))


def fetch(layer: int, misses: Misses, arena_base: Tensor, pool: Tensor, blocks: int = PROGRAMS) -> None:
    """As `fetch_plain`."""
    _, slots, stride = pool.shape
    words = pool.view(torch.int32)
    _fetch_kernel[(blocks,)](
        layer,
        *misses,
        arena_base,
        words,
        SLOTS=slots,
        WORDS=stride // 4,
        PROGRAMS=blocks,
        num_warps=8,
        **overlapping(),
    )


def _settle_awaited(layer: int, directory: Directory, awaited: Awaited, needed: list[int]) -> None:
    expert, slot = int(awaited.expert[layer]), int(awaited.slot[layer])
    if expert in needed:
        directory.slot_of[layer, expert], directory.expert_of[layer, slot] = slot, expert
        awaited.counters[layer, 1] += 1
    elif expert != ABSENT:
        awaited.stop[layer] = 1
    awaited.expert[layer] = ABSENT


def slots_to_fill(
    layer: int, policy: str, directory: Directory, clock: int, in_use: set[int], wanted: int
) -> list[int]:
    """As many slots as are wanted, or as there are: free ones, then victims; none of those in use."""
    expert_of = directory.expert_of[layer].tolist()
    last_used, uses = directory.last_used[layer].tolist(), directory.uses[layer].tolist()
    chosen = [slot for slot, expert in enumerate(expert_of) if expert == ABSENT][:wanted]
    usage = {
        slot: Usage(last_used[slot], uses[slot])
        for slot, expert in enumerate(expert_of)
        if expert != ABSENT and slot not in in_use
    }
    while len(chosen) < wanted and usage:
        victim = POLICIES[policy](clock, usage.items())
        chosen.append(victim)
        del usage[victim]
    return chosen


@triton.jit
def worth(last_used, uses, now, free, FREQUENCY: tl.constexpr):
    """What a slot is worth keeping, as a fraction (numerator, denominator > 0) of int64; less goes first.

    A policy's own order, below which are the free slots, equal among themselves.
    """
    if FREQUENCY:
        numerator, denominator = uses.to(tl.int64), (now - last_used + 1).to(tl.int64)
    else:
        numerator, denominator = last_used.to(tl.int64), tl.full(last_used.shape, 1, tl.int64)
    return tl.where(free, -1, numerator), tl.where(free, 1, denominator)


@triton.jit
def turns(may_go, numerator, denominator, slot):
    """How many of the slots that may go do so before each: (slots,) int32. Of equals, the lower first."""
    # a / b < c / d as a * d < c * b; int64 holds the products of any two counts of int32.
    theirs = numerator[None, :] * denominator[:, None]
    ours = numerator[:, None] * denominator[None, :]
    before = (theirs < ours) | ((theirs == ours) & (slot[None, :] < slot[:, None]))
    return tl.sum((before & may_go[None, :]).to(tl.int32), 1)


@triton.jit
def _first_of_equals(expert, chosen, pair):
    """Whether a pair is the first of those that chose its expert: (pairs,) bool."""
    earlier = (expert[None, :] == expert[:, None]) & (pair[None, :] < pair[:, None])
    return chosen & (tl.sum(earlier.to(tl.int32), 1) == 0)


@triton.jit(do_not_specialize=["layer"])
def _resolve_kernel(
    choices,
    layer,
    slot_of,
    expert_of,
    last_used,
    uses,
    clock,
    counters,
    awaited_expert,
    awaited_slot,
    awaited_stop,
    awaited_counters,
    frame_of,
    slot_ids,
    miss_length,
    miss_frames,
    miss_slots,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    FREQUENCY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_inputs(OVERLAP)
    pair, slot = tl.arange(0, PADDED_PAIRS), tl.arange(0, PADDED_SLOTS)
    chosen, exists = pair < PAIRS, slot < SLOTS
    slot_of += layer * EXPERTS
    expert_of += layer * SLOTS
    last_used += layer * SLOTS
    uses += layer * SLOTS
    counters += layer * 2
    awaited_counters += layer * 3

    expert = tl.load(choices + pair, mask=chosen, other=EXPERTS).to(tl.int32)
    resident = tl.load(expert_of + slot, mask=exists, other=-1)
    recency = tl.load(last_used + slot, mask=exists, other=0)
    frequency = tl.load(uses + slot, mask=exists, other=0)
    now = tl.load(clock + layer) + 1
    hits_before, misses_before = tl.load(counters), tl.load(counters + 1)
    arrived_before = tl.load(awaited_counters + 1)
    place = tl.load(slot_of + expert, mask=chosen, other=-1)
    frame = tl.load(frame_of + layer * EXPERTS + expert, mask=chosen, other=0)
    awaited, its_slot = tl.load(awaited_expert + layer), tl.load(awaited_slot + layer)

    place = tl.where(chosen & (expert == awaited), its_slot, place)
    arrived = tl.max((chosen & (expert == awaited)).to(tl.int32), 0)
    first = _first_of_equals(expert, chosen, pair)
    hit, missing = first & (place >= 0), first & (place < 0)
    # The place in the ascending order of misses; pairs of one expert get the same.
    order = tl.sum((missing[None, :] & (expert[None, :] < expert[:, None])).to(tl.int32), 1)
    in_use = tl.sum((place[:, None] == slot[None, :]).to(tl.int32), 0) > 0
    may_go = exists & ~in_use
    turn = turns(may_go, *worth(recency, frequency, now, resident < 0, FREQUENCY), slot)
    taken = tl.max(tl.where(may_go[None, :] & (turn[None, :] == order[:, None]), slot[None, :], -1), 1)
    hits, misses = tl.sum(hit.to(tl.int32), 0), tl.sum(missing.to(tl.int32), 0)
    filled = may_go & (turn < misses)

    # Threads store what others have loaded above: no store may overtake a load.
    tl.debug_barrier()
    tl.store(clock + layer, now)
    tl.store(counters, hits_before + hits)
    tl.store(counters + 1, misses_before + misses)
    tl.store(miss_length, tl.sum(filled.to(tl.int32), 0))
    tl.store(last_used + slot, now, mask=in_use | filled)
    tl.store(uses + slot, tl.where(filled, 1, frequency + 1), mask=in_use | filled)
    tl.store(slot_of + resident, -1, mask=filled & (resident >= 0))
    settles = missing & (taken >= 0)
    tl.store(slot_of + expert, taken, mask=settles)
    tl.store(expert_of + taken, expert, mask=settles)
    tl.store(miss_frames + order, frame, mask=settles)
    tl.store(miss_slots + order, taken, mask=settles)
    tl.store(slot_ids + pair, tl.where(place >= 0, place, taken), mask=chosen)
    tl.store(slot_of + awaited, its_slot, mask=arrived > 0)
    tl.store(expert_of + its_slot, awaited, mask=arrived > 0)
    tl.store(awaited_counters + 1, arrived_before + arrived)
    tl.store(awaited_stop + layer, 1, mask=(awaited >= 0) & (arrived == 0))
    tl.store(awaited_expert + layer, -1)


@triton.jit(do_not_specialize=["layer"])
def _fetch_kernel(
    layer,
    miss_length,
    miss_frames,
    miss_slots,
    arena_base,
    pool,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_inputs(OVERLAP)
    mine = tl.program_id(0) * _BLOCK + tl.arange(0, _BLOCK)
    base, length = tl.load(arena_base), tl.load(miss_length)
    miss = 0
    while miss < length:
        frame, slot = tl.load(miss_frames + miss).to(tl.int64), tl.load(miss_slots + miss).to(tl.int64)
        # The compiler cannot know how an address from memory is aligned, and must, to load 16 bytes at once.
        source = tl.multiple_of((base + frame * (WORDS * 4)).to(tl.pointer_type(tl.int32)), 16)
        target = pool + (layer.to(tl.int64) * SLOTS + slot) * WORDS
        for start in tl.range(0, WORDS, PROGRAMS * _BLOCK, num_stages=4):
            word = start + mine
            inside = word < WORDS
            tl.store(target + word, tl.load(source + word, mask=inside), mask=inside)
        miss += 1
