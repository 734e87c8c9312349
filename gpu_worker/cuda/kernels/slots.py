"""The slot cache's look-up: which slot holds an expert, which is to be filled with one that is absent.

`resolve` takes the decisions of `gpu_worker.slots.cache` for a step whose experts all fit, and orders the
copies of what is missing. A policy ranks all slots that may go before the step changes any of them, so every
miss knows its slot by its rank alone, and nothing is done one after the other. The tensors belong to
`gpu_worker.cuda.device_slots`. Not done here: copying (`orders`), predicting what to copy ahead (`prefetch`),
steps that need more experts than there are slots, experts without a frame.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.cuda.kernels.lane import HANDED_OVER, Lane, hand_over, hand_over_plain
from gpu_worker.cuda.kernels.orders import AHEAD, GIVEN_UP, Orders, chunks_of, lanes, order_copies
from gpu_worker.cuda.kernels.overlap import overlapping, wait_for_inputs
from gpu_worker.slots import policies
from gpu_worker.slots.policies import POLICIES, Usage

ABSENT = -1
FADING = tl.constexpr(policies.FADING)
_LEAST = tl.constexpr(-(1 << 31))  # below the last use of what is retired; times any age it is an int64 yet


class Directory(NamedTuple):
    """Which expert lies where, and what the policies know of it; int32 but for `counters` (int64)."""

    slot_of: Tensor  # (layers, experts), -1 when absent
    expert_of: Tensor  # (layers, slots), -1 when free
    last_used: Tensor  # (layers, slots), the clock at the last use
    uses: Tensor  # (layers, experts), steps that chose it, those longer ago for less: see `policies`
    clock: Tensor  # (layers,), steps
    counters: Tensor  # (layers, 2), hits and misses, each expert counted once a step


class Awaited(NamedTuple):
    """The guesses of `prefetch`: whose records the first orders of each layer copy ahead of its choice.

    Until it is chosen the slot of such an expert is free in the directory, but nobody else's. Guesses that
    nobody began to copy count only if they were chosen and copied after all.
    """

    expert: Tensor  # (layers, AHEAD) int32, -1 for none
    counters: Tensor  # (layers, 3) int64: guesses that were kept up, those chosen; bytes copied for guesses


def resolve_plain(
    choices: Tensor,
    layer: int,
    policy: str,
    directory: Directory,
    awaited: Awaited,
    orders: Orders,
    frame_of: Tensor,
    slot_ids: Tensor,
    stride: int,
    lane: Lane | None = None,
    x: Tensor | None = None,
) -> None:
    """Find or make room for every expert of choices (rows, k) int64, contiguous, 128 pairs at most.

    Writes slot_ids[row * k + rank], the layer's row of `directory`, and the orders of what is missing, in
    ascending order of experts, with frames from frame_of (layers, experts) int32 and records of `stride`
    bytes. An awaited expert that is chosen counts as found where it is going. One that is not is given up,
    and its slot, which a copy may still write to, stays free for this step. The different experts must fit
    the other slots; slot_ids says -1 for one that does not. With a lane, for one row, whose activations are
    x, some of what is absent is handed over, and counts as missing: see `lane.hand_over_plain`.
    """
    needed = sorted(set(choices.flatten().tolist()))
    slot_of, expert_of, uses = directory.slot_of[layer], directory.expert_of[layer], directory.uses[layer]
    directory.clock[layer] += 1
    clock = int(directory.clock[layer])
    if clock % FADING.value == 0:
        uses.copy_((uses + 1) // 2)
    uses[needed] += 1
    handed: list[int] = []
    given_up: list[int] = []
    if lane is not None:
        assert x is not None
        guesses = awaited.expert[layer], awaited.counters[layer, 0]
        handed, given_up = hand_over_plain(
            choices, layer, slot_of, clock, *guesses, orders, frame_of, x, lane
        )
        needed = [expert for expert in needed if expert not in handed]
    given_up += _settle_awaited(layer, directory, awaited, orders, needed, stride)
    absent = [expert for expert in needed if slot_of[expert] == ABSENT]
    places = [int(slot_of[expert]) for expert in needed if slot_of[expert] != ABSENT]
    directory.counters[layer] += torch.tensor([len(places), len(absent) + len(handed)]).to(directory.counters)
    directory.last_used[layer, places] = clock
    filled = slots_to_fill(layer, policy, directory, clock, {*places, *given_up}, len(absent))
    for expert, slot in zip(absent, filled, strict=False):
        if expert_of[slot] != ABSENT:
            slot_of[expert_of[slot]] = ABSENT
        slot_of[expert], expert_of[slot] = slot, expert
    directory.last_used[layer, filled] = clock
    missed = slice(AHEAD, AHEAD + len(filled))
    orders.frame[layer, missed] = frame_of[layer, absent[: len(filled)]]
    orders.slot[layer, missed] = torch.tensor(filled, dtype=torch.int32)
    orders.claimed[layer, missed] = orders.done[layer, missed] = 0
    orders.due[layer, missed] = chunks_of(stride)
    slots = slot_of[choices.flatten()]
    slots[torch.isin(choices.flatten(), choices.new_tensor(handed))] = HANDED_OVER.value
    slot_ids[: choices.numel()] = slots


def resolve(
    choices: Tensor,
    layer: int,
    policy: str,
    directory: Directory,
    awaited: Awaited,
    orders: Orders,
    frame_of: Tensor,
    slot_ids: Tensor,
    stride: int,
    lane: Lane | None = None,
    x: Tensor | None = None,
) -> None:
    """As `resolve_plain`, in one program."""
    assert (lane is None) == (x is None)
    told: tuple[Tensor | None, ...] = (None,) * 6
    if lane is not None:
        told = (x, lane.mailbox.request, lane.mailbox.x, lane.posted, lane.share, lane.computed)
    _resolve_kernel[(1,)](
        choices, layer, directory.expert_of.shape[1], *directory, *awaited, *orders, frame_of, slot_ids,
        *told, COLUMNS=0 if x is None else x.numel(), STRIDE=stride,
        PADDED_EXPERTS=triton.next_power_of_2(directory.slot_of.shape[1]),
        **deciding(choices.numel(), directory, orders, policy, stride),
    )  # fmt: skip


def deciding(pairs: int, directory: Directory, orders: Orders, policy: str, stride: int) -> dict[str, Any]:
    """The launch of a kernel that looks pairs up in a layer and chooses victims by `worth` and `turns`."""
    slots = directory.expert_of.shape[1]
    padded_slots, padded_pairs = (triton.next_power_of_2(max(8, count)) for count in (slots, pairs))
    # Slots are compared each with each, and so are pairs: one warp while 32 comparisons a thread will do.
    warps = min(8, max(1, max(padded_slots, padded_pairs) ** 2 // 1024))
    return {
        "EXPERTS": directory.slot_of.shape[1], "PAIRS": pairs, "PADDED_SLOTS": padded_slots,
        "PADDED_PAIRS": padded_pairs, "ORDERS": orders.claimed.shape[1], "AHEAD": AHEAD,
        "LANES": lanes(AHEAD, warps), "CHUNKS": chunks_of(stride), "FREQUENCY": policy == "lfru",
        "num_warps": warps, **overlapping(),
    }  # fmt: skip


def _settle_awaited(
    layer: int, directory: Directory, awaited: Awaited, orders: Orders, needed: list[int], stride: int
) -> list[int]:
    """The slots of guesses that were wrong."""
    chunks, given_up = chunks_of(stride), []
    for order, expert in enumerate(awaited.expert[layer].tolist()):
        slot = int(orders.slot[layer, order])
        if expert in needed:
            directory.slot_of[layer, expert], directory.expert_of[layer, slot] = slot, expert
            awaited.counters[layer, 1:] += torch.tensor([1, stride]).to(awaited.counters)
        elif expert != ABSENT:
            due = min(int(orders.claimed[layer, order]), chunks)
            orders.claimed[layer, order] += GIVEN_UP.value
            orders.due[layer, order] = due
            awaited.counters[layer, 0] -= int(due == 0)
            awaited.counters[layer, 2] += due * stride // chunks
            given_up.append(slot)
    awaited.expert[layer] = ABSENT
    return given_up


def slots_to_fill(
    layer: int, policy: str, directory: Directory, clock: int, in_use: set[int], wanted: int
) -> list[int]:
    """As many slots as are wanted, or as there are: free ones, then victims; none of those in use."""
    expert_of = directory.expert_of[layer].tolist()
    last_used, uses = directory.last_used[layer].tolist(), directory.uses[layer].tolist()
    free = [slot for slot, expert in enumerate(expert_of) if expert == ABSENT and slot not in in_use]
    chosen = free[:wanted]
    usage = {
        slot: Usage(last_used[slot], uses[expert])
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
        numerator, denominator = uses.to(tl.int64), now.to(tl.int64) - last_used + 1
    else:
        numerator, denominator = last_used.to(tl.int64), tl.full(last_used.shape, 1, tl.int64)
    return tl.where(free, _LEAST, numerator), tl.where(free, 1, denominator)


@triton.jit
def turns(may_go, numerator, denominator, slot):
    """How many of the slots that may go do so before each: (slots,) int32. Of equals, the lower first."""
    # a / b < c / d as a * d < c * b; int64 holds the products of any two counts of int32.
    theirs = numerator[None, :] * denominator[:, None]
    ours = numerator[:, None] * denominator[None, :]
    before = (theirs < ours) | ((theirs == ours) & (slot[None, :] < slot[:, None]))
    return tl.sum((before & may_go[None, :]).to(tl.int32), 1)


@triton.jit
def _fade(uses, EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr):
    """Halve the uses of a layer's experts, rounded up; nobody's load of them comes after a store of this."""
    every = tl.arange(0, PADDED_EXPERTS)
    halves = (tl.load(uses + every, mask=every < EXPERTS, other=0) + 1) // 2
    tl.debug_barrier()
    tl.store(uses + every, halves, mask=every < EXPERTS)


@triton.jit
def first_of_equals(expert, chosen, pair):
    """Whether a pair is the first of those that chose its expert: (pairs,) bool."""
    earlier = (expert[None, :] == expert[:, None]) & (pair[None, :] < pair[:, None])
    return chosen & (tl.sum(earlier.to(tl.int32), 1) == 0)


@triton.jit
def among(which, slot):
    """Whether a slot is among some (n,), of which negative ones are none: (slots,) bool."""
    return tl.sum((which[:, None] == slot[None, :]).to(tl.int32), 0) > 0


@triton.jit
def _take_slots(
    pair, expert, missing, first, misses, may_go, slot, resident, recency, frequency, now,
    slot_of, expert_of, last_used, slot_ids, FREQUENCY: tl.constexpr,
):  # fmt: skip
    """Each missing pair's place in the ascending order of misses, and the slot whose turn that is, or -1.

    Pairs of one expert get the same. It has that slot from now on, and what the slot held is absent.
    """
    turn = turns(may_go, *worth(recency, frequency, now, resident < 0, FREQUENCY), slot)
    emptied = may_go & (turn < misses)
    tl.store(last_used + slot, now, mask=emptied)
    tl.store(slot_of + resident, -1, mask=emptied & (resident >= 0))
    order = tl.sum(((first & missing)[None, :] & (expert[None, :] < expert[:, None])).to(tl.int32), 1)
    taken = tl.max(tl.where(may_go[None, :] & (turn[None, :] == order[:, None]), slot[None, :], -1), 1)
    tl.store(slot_ids + pair, taken, mask=missing)
    tl.store(slot_of + expert, taken, mask=missing & (taken >= 0))
    tl.store(expert_of + taken, expert, mask=missing & (taken >= 0))
    return order, taken


@triton.jit
def _settle_guesses(guess, right, wrong, counters, claimed, due, CHUNKS: tl.constexpr, STRIDE: tl.constexpr):
    """Give up the orders of wrong guesses, count what all brought and cost."""
    chosen = tl.sum(right.to(tl.int64), 0)
    tl.atomic_add(counters + 1, chosen, sem="relaxed")
    tl.atomic_add(counters + 2, chosen * STRIDE, sem="relaxed")
    if tl.max(wrong.to(tl.int32), 0) > 0:  # seldom, and it takes a while
        begun = tl.minimum(tl.atomic_add(claimed + guess, GIVEN_UP, mask=wrong, sem="relaxed"), CHUNKS)
        tl.store(due + guess, begun, mask=wrong)
        tl.atomic_add(counters, -tl.sum((wrong & (begun == 0)).to(tl.int64), 0), sem="relaxed")
        copied = tl.sum(tl.where(wrong, begun, 0).to(tl.int64) * STRIDE // CHUNKS, 0)
        tl.atomic_add(counters + 2, copied, sem="relaxed")


@triton.jit
def _note_use(
    pair, first, found, handed, place, misses, slot, in_use, now, awaited, its_slot, arrived,
    slot_of, expert_of, last_used, counters, slot_ids, awaited_expert,
):  # fmt: skip
    """Store what is known before anything is missing: who was found where, and whose guess has come true."""
    tl.atomic_add(counters, tl.sum((first & found).to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(counters + 1, misses.to(tl.int64) + tl.sum(handed.to(tl.int64), 0), sem="relaxed")
    tl.store(last_used + slot, now, mask=in_use)
    tl.store(slot_ids + pair, tl.where(handed, HANDED_OVER, place), mask=found | handed)
    tl.store(slot_of + awaited, its_slot, mask=arrived)
    tl.store(expert_of + its_slot, awaited, mask=arrived)
    tl.store(awaited_expert, -1, mask=awaited >= 0)


@triton.jit(do_not_specialize=["layer", "slots"])
def _resolve_kernel(
    choices, layer, slots, slot_of, expert_of, last_used, uses, clock, counters,
    awaited_expert, awaited_counters, order_frame, order_slot, claimed, done, due, frame_of, slot_ids,
    x, request, lane_x, posted, share, computed,
    COLUMNS: tl.constexpr, EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, PAIRS: tl.constexpr,
    PADDED_SLOTS: tl.constexpr, PADDED_PAIRS: tl.constexpr, ORDERS: tl.constexpr, AHEAD: tl.constexpr,
    LANES: tl.constexpr, CHUNKS: tl.constexpr, STRIDE: tl.constexpr, FREQUENCY: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    pair, slot, guess = tl.arange(0, PADDED_PAIRS), tl.arange(0, PADDED_SLOTS), tl.arange(0, LANES)
    chosen, exists = pair < PAIRS, slot < slots
    slot_of, expert_of = slot_of + layer * EXPERTS, expert_of + layer * slots
    last_used, uses = last_used + layer * slots, uses + layer * EXPERTS
    counters, awaited_counters = counters + layer * 2, awaited_counters + layer * 3
    awaited_expert += layer * AHEAD
    order_frame, order_slot = order_frame + layer * ORDERS, order_slot + layer * ORDERS
    claimed, done, due = claimed + layer * ORDERS, done + layer * ORDERS, due + layer * ORDERS

    expert = tl.load(choices + pair, mask=chosen, other=EXPERTS).to(tl.int32)
    resident = tl.load(expert_of + slot, mask=exists, other=-1)
    recency = tl.load(last_used + slot, mask=exists, other=0)
    frequency = tl.load(uses + resident, mask=resident >= 0, other=0)
    now = tl.load(clock + layer) + 1
    place = tl.load(slot_of + expert, mask=chosen, other=-1)
    used = tl.load(uses + expert, mask=chosen, other=0)
    frame = tl.load(frame_of + layer * EXPERTS + expert, mask=chosen, other=0)
    awaited = tl.load(awaited_expert + guess, mask=guess < AHEAD, other=-1)
    its_slot = tl.load(order_slot + guess, mask=awaited >= 0, other=-1)

    same = expert[:, None] == awaited[None, :]
    arrived = tl.max(same.to(tl.int32), 0) > 0
    handed, dropped = chosen & False, arrived & False
    if COLUMNS > 0:  # a lane, and one row
        handed, dropped = hand_over(
            pair, expert, chosen, place, frame, guess, same, layer, now, claimed, due, awaited_counters,
            x, request, lane_x, posted, share, computed, COLUMNS, EXPERTS, AHEAD,
        )  # fmt: skip
    arrived, same = arrived & ~dropped, same & ~dropped[None, :]
    place = tl.maximum(place, tl.max(tl.where(same, its_slot[None, :], -1), 1))
    first = first_of_equals(expert, chosen, pair)
    found, missing = chosen & (place >= 0), chosen & (place < 0) & ~handed
    in_use = among(place, slot)
    misses = tl.sum((first & missing).to(tl.int32), 0)

    if now % FADING == 0:
        used, frequency = (used + 1) // 2, (frequency + 1) // 2
        _fade(uses, EXPERTS, PADDED_EXPERTS)
    # Threads store what others have loaded above: no store may overtake a load.
    tl.debug_barrier()
    tl.store(clock + layer, now)
    tl.store(uses + expert, used + 1, mask=first)
    _note_use(
        pair, first, found, handed, place, misses, slot, in_use, now, awaited, its_slot, arrived,
        slot_of, expert_of, last_used, counters, slot_ids, awaited_expert + guess,
    )  # fmt: skip
    wrong = (awaited >= 0) & ~arrived & ~dropped
    _settle_guesses(guess, arrived, wrong, awaited_counters, claimed, due, CHUNKS, STRIDE)
    if misses > 0:  # seldom, where there are many slots, and it takes longer than the rest
        may_go = exists & ~in_use & ~among(its_slot, slot)
        order, taken = _take_slots(
            pair, expert, missing, first, misses, may_go, slot, resident, recency, frequency, now,
            slot_of, expert_of, last_used, slot_ids, FREQUENCY,
        )  # fmt: skip
        order_copies(
            order_frame, order_slot, claimed, done, due, AHEAD + order, frame, taken, missing & (taken >= 0),
            first & missing & (taken >= 0), CHUNKS,
        )  # fmt: skip
