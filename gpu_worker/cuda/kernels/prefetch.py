"""Copying ahead: what the next steps of a few layers will probably choose.

`reserve` takes slots for predicted experts that are absent, as the policy would at a miss, and orders their
copies. It is asked again at every layer on the way: a guess that a later prediction does not bear out is
given up if nobody has begun to copy it. `slots.resolve` settles the rest, once the layer's choice is known.
So a wrong guess moves bytes only while nobody else wants the link, and costs a slot that the next miss would
have taken. Not done here: predicting, copying (`orders`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.cuda.kernels.orders import AHEAD, GIVEN_UP, Orders, chunks_of, order_copies
from gpu_worker.cuda.kernels.overlap import wait_for_inputs
from gpu_worker.cuda.kernels.slots import (
    ABSENT,
    Awaited,
    Directory,
    among,
    deciding,
    first_of_equals,
    slots_to_fill,
    turns,
    worth,
)


def most_guesses(slots: int, pairs: int) -> int:
    """How many guesses a layer may have, so that a step of so many pairs fits beside the wrong ones."""
    return max(0, min(AHEAD, slots - pairs))


def reserve_plain(
    choices: Tensor,
    first: int,
    policy: str,
    directory: Directory,
    awaited: Awaited,
    orders: Orders,
    frame_of: Tensor,
    enabled: Tensor,
    stride: int,
) -> None:
    """Await absent experts of choices (layers, rows, k) int64, best first, in layers `first` and following.

    At most `most_guesses` a layer, those of earlier calls included. Slots of predicted experts stay. frame_of
    (layers, experts) int32; nothing new is awaited where enabled (1,) int32 is 0, not 1.
    """
    for layer, of_layer in enumerate(choices, first):
        predicted = list(dict.fromkeys(of_layer.flatten().tolist()))
        slot_of, expert_of = directory.slot_of[layer], directory.expert_of[layer]
        _give_up(layer, awaited, orders, predicted)
        kept = {int(slot_of[expert]) for expert in predicted} - {ABSENT}
        guesses = awaited.expert[layer].tolist()
        kept |= {int(orders.slot[layer, order]) for order, expert in enumerate(guesses) if expert != ABSENT}
        limit = most_guesses(len(expert_of), of_layer.numel())
        open_orders = [order for order in range(limit) if guesses[order] == ABSENT]
        wanted = [expert for expert in predicted if slot_of[expert] == ABSENT and expert not in guesses]
        count = min(len(wanted), len(open_orders)) * int(enabled)
        slots = slots_to_fill(layer, policy, directory, int(directory.clock[layer]) + 1, kept, count)
        for order, expert, slot in zip(open_orders, wanted, slots, strict=False):
            if expert_of[slot] != ABSENT:
                slot_of[expert_of[slot]] = ABSENT
            expert_of[slot] = ABSENT
            awaited.expert[layer, order] = expert
            awaited.counters[layer, 0] += 1
            orders.frame[layer, order], orders.slot[layer, order] = frame_of[layer, expert], slot
            orders.due[layer, order] = chunks_of(stride)
            orders.claimed[layer, order] = orders.done[layer, order] = 0


def _give_up(layer: int, awaited: Awaited, orders: Orders, predicted: list[int]) -> None:
    for order, expert in enumerate(awaited.expert[layer].tolist()):
        if expert != ABSENT and expert not in predicted and orders.claimed[layer, order] == 0:
            orders.claimed[layer, order], orders.due[layer, order] = GIVEN_UP.value, 0
            awaited.expert[layer, order] = ABSENT
            awaited.counters[layer, 0] -= 1


def reserve(
    choices: Tensor,
    first: int,
    policy: str,
    directory: Directory,
    awaited: Awaited,
    orders: Orders,
    frame_of: Tensor,
    enabled: Tensor,
    stride: int,
) -> None:
    """As `reserve_plain`, a layer a program; 128 pairs a layer at most."""
    pairs, slots = choices[0].numel(), directory.expert_of.shape[1]
    _reserve_kernel[(len(choices),)](
        choices, first, slots, *directory, *awaited, *orders, frame_of, enabled,
        MOST=most_guesses(slots, pairs),
        **deciding(pairs, directory, orders, policy, stride),
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "slots"])
def _reserve_kernel(
    choices, first, slots, slot_of, expert_of, last_used, uses, clock, _found_and_missed,
    awaited_expert, counters, order_frame, order_slot, claimed, done, due, frame_of, enabled,
    EXPERTS: tl.constexpr, PAIRS: tl.constexpr, PADDED_SLOTS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr, ORDERS: tl.constexpr, AHEAD: tl.constexpr, LANES: tl.constexpr,
    MOST: tl.constexpr, CHUNKS: tl.constexpr, FREQUENCY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    pair, slot, guess = tl.arange(0, PADDED_PAIRS), tl.arange(0, PADDED_SLOTS), tl.arange(0, LANES)
    chosen, exists = pair < PAIRS, slot < slots
    choices += tl.program_id(0) * PAIRS
    layer = first + tl.program_id(0)
    slot_of += layer * EXPERTS
    expert_of += layer * slots
    uses += layer * EXPERTS
    counters += layer * 3
    awaited_expert += layer * AHEAD + guess
    order = layer * ORDERS + guess

    expert = tl.load(choices + pair, mask=chosen, other=EXPERTS).to(tl.int32)
    place = tl.load(slot_of + expert, mask=chosen, other=-1)
    resident = tl.load(expert_of + slot, mask=exists, other=-1)
    recency = tl.load(last_used + layer * slots + slot, mask=exists, other=0)
    frequency = tl.load(uses + resident, mask=resident >= 0, other=0)
    now = tl.load(clock + layer) + 1
    on = tl.load(enabled)
    awaited = tl.load(awaited_expert, mask=guess < AHEAD, other=-1)

    same = expert[:, None] == awaited[None, :]
    doubtful = (awaited >= 0) & (tl.max(same.to(tl.int32), 0) == 0)
    coming = tl.max(same.to(tl.int32), 1) > 0
    wanted = first_of_equals(expert, chosen, pair) & (place < 0) & ~coming & (pair < PAIRS * on)
    if tl.max(doubtful.to(tl.int32), 0) + tl.max(wanted.to(tl.int32), 0) == 0:
        return
    # This knows no mask, but there is no claim of -1 chunks: only doubtful guesses are exchanged, if
    # nobody has begun to copy them. Lanes beyond AHEAD look at the first order of all.
    known = tl.where(guess < AHEAD, order, 0)
    there, then = tl.where(doubtful, 0, -1), tl.full([LANES], GIVEN_UP, tl.int32)
    begun = tl.atomic_cas(claimed + known, there, then, sem="relaxed")
    dropped = doubtful & (begun == 0)
    awaited = tl.where(dropped, -1, awaited)
    its_slot = tl.load(order_slot + order, mask=awaited >= 0, other=-1)

    turn_wanted = tl.sum((wanted[None, :] & (pair[None, :] < pair[:, None])).to(tl.int32), 1)
    free = (awaited < 0) & (guess < MOST)
    turn_free = tl.sum((free[None, :] & (guess[None, :] < guess[:, None])).to(tl.int32), 1)
    may_go = exists & ~among(place, slot) & ~among(its_slot, slot)
    turn = turns(may_go, *worth(recency, frequency, now, resident < 0, FREQUENCY), slot)
    its_expert = tl.max(
        tl.where(wanted[None, :] & (turn_wanted[None, :] == turn_free[:, None]), expert[None, :], -1), 1
    )
    new_slot = tl.max(tl.where(may_go[None, :] & (turn[None, :] == turn_free[:, None]), slot[None, :], -1), 1)
    made = free & (its_expert >= 0) & (new_slot >= 0)
    frame = tl.load(frame_of + layer * EXPERTS + its_expert, mask=made, other=0)
    taken = may_go & (turn < tl.sum(made.to(tl.int32), 0))

    # Threads store what others have loaded above: no store may overtake a load.
    tl.debug_barrier()
    tl.store(slot_of + resident, -1, mask=taken & (resident >= 0))
    tl.store(expert_of + slot, -1, mask=taken)
    tl.store(awaited_expert, tl.where(made, its_expert, awaited), mask=guess < AHEAD)
    kept_up = tl.sum(made.to(tl.int64) - dropped.to(tl.int64), 0)
    tl.atomic_add(counters, kept_up, sem="relaxed")
    tl.store(due + order, 0, mask=dropped)
    order_copies(order_frame, order_slot, claimed, done, due, order, frame, new_slot, made, made, CHUNKS)
