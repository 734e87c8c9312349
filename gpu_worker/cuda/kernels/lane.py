"""The device's end of the lane: experts that the host's processor computes while others come over the link.

A step of one sequence hands over some of the experts that are absent and that nobody has begun to copy: these
get no slot. The layer's activations and the frames of these experts go to page-locked memory, and the step
goes on; `expert_products.combine` waits for the answer. The host computes in the order of operations that
`row_products` and `rotation` have, so nothing of this changes a bit. Not done here: the host's end
(`gpu_worker.kernels.expert_lane`), resolving the other experts (`slots`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.cuda.kernels.memory_order import acquired, acquired_from_host, pause
from gpu_worker.cuda.kernels.orders import GIVEN_UP, Orders
from gpu_worker.kernels.expert_lane import Mailbox

HANDED_OVER = tl.constexpr(-2)  # instead of a slot id
SHARES = tl.constexpr(16)
# From this share on a lone expert is handed over, since the link is seldom idle.
_LEAST = tl.constexpr(6)
# In one of so many steps not all are handed over, or one that is always alone would never get a slot.
_EVERY = tl.constexpr(16)


class Lane(NamedTuple):
    """The mailbox, in page-locked memory of the host, and what the device notes; int32 unless said."""

    mailbox: Mailbox
    heard: Tensor  # (1,): the number of the last request whose answer a kernel has waited for
    posted: Tensor  # (1,): the number of the last request
    share: Tensor  # (1,): of experts that could be handed over, in SHARES-ths: see `_share_of`
    computed: Tensor  # (layers,) int64: experts that were handed over

    @staticmethod
    def of(mailbox: Mailbox, layers: int, share: int, device: torch.device) -> Lane:
        """Nothing posted yet."""
        heard, posted, shares = torch.tensor([0, 0, share], dtype=torch.int32, device=device).split(1)
        return Lane(mailbox, heard, posted, shares, torch.zeros(layers, dtype=torch.int64, device=device))


def hand_over_plain(
    choices: Tensor,
    layer: int,
    slot_of: Tensor,
    now: int,
    awaited: Tensor,
    kept_up: Tensor,
    orders: Orders,
    frame_of: Tensor,
    x: Tensor,
    lane: Lane,
) -> tuple[list[int], list[int]]:
    """Post the share of choices (1, k) that no copy has been begun for; x (1, blocks, 128) float32 is theirs.

    slot_of (experts,), awaited (AHEAD,) and kept_up (1,) are the layer's, `now` the clock of this step.
    Experts that were not foreseen go first, each of them first at times, then the last guesses; these are
    awaited no more. Returns the experts, and the slots of guesses that were given up.
    """
    chosen, guesses = choices.flatten().tolist(), awaited.tolist()
    unforeseen = [expert for expert in chosen if slot_of[expert] < 0 and expert not in guesses]
    unforeseen.sort(key=lambda expert: (expert + now) % len(slot_of))
    unbegun = [n for n, expert in enumerate(guesses) if expert in chosen and orders.claimed[layer, n] == 0]
    count = _share_of(len(unforeseen) + len(unbegun), int(lane.share), now)
    handed = unforeseen[:count]
    given_up = unbegun[::-1][: count - len(handed)]
    handed += [guesses[order] for order in given_up]
    slots = orders.slot[layer, given_up].tolist()
    orders.claimed[layer, given_up], orders.due[layer, given_up] = GIVEN_UP.value, 0
    awaited[given_up] = -1
    kept_up -= len(given_up)
    lane.computed[layer] += len(handed)
    if handed:
        request = lane.mailbox.request
        lane.mailbox.x.copy_(x.flatten())
        request[1] = layer
        for pair, expert in enumerate(chosen):
            request[2 + pair] = int(frame_of[layer, expert]) if expert in handed else -1
        lane.posted.add_(1)
        request[0] = lane.posted[0]
    return handed, slots


def _share_of(count: int, share: int, now: int) -> int:
    rounded = (count * share + SHARES.value // 2) // SHARES.value
    if now % _EVERY.value == 0:
        return max(0, min(rounded, count - 1))
    return min(count, max(rounded, share >= _LEAST.value))


@triton.jit
def hand_over(
    pair, expert, chosen, place, frame, guess, same, layer, now, claimed, due, kept_up,
    activations, request, x, posted, share, computed,
    COLUMNS: tl.constexpr, EXPERTS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Hand over pairs of one row, as `hand_over_plain` does: masks of the pairs, and of their guesses.

    same (pairs, guesses): whether a pair's expert is awaited by a guess.
    """
    unforeseen = chosen & (place < 0) & (tl.max(same.to(tl.int32), 1) == 0)
    right = tl.max(same.to(tl.int32), 0) > 0
    handed, dropped = chosen & False, right & False
    if tl.max(unforeseen.to(tl.int32), 0) + tl.max(right.to(tl.int32), 0) > 0:
        handed, dropped = _divided(
            (expert + now) % EXPERTS, unforeseen, guess, right, now, claimed, share, AHEAD
        )  # fmt: skip
        handed |= tl.max((same & dropped[None, :]).to(tl.int32), 1) > 0
        if tl.max(handed.to(tl.int32), 0) > 0:
            _post(handed, pair, chosen, layer, frame, activations, request, x, posted, COLUMNS)
            tl.store(due + guess, 0, mask=dropped)
            tl.atomic_add(kept_up, -tl.sum(dropped.to(tl.int64), 0), sem="relaxed")
            tl.atomic_add(computed + layer, tl.sum(handed.to(tl.int64), 0), sem="relaxed")
    return handed, dropped


@triton.jit
def _divided(
    turn, unforeseen, guess, right, now, claimed, share, AHEAD: tl.constexpr
):  # fmt: skip
    """The lane's share of `unforeseen` pairs and then of `right` guesses: masks of both.

    A guess that somebody has begun to copy is left to that.
    """
    # Orders beyond AHEAD are not guesses; such lanes look at the first order of all.
    known = tl.where(guess < AHEAD, guess, 0)
    unbegun = right & (tl.load(claimed + known, volatile=True) == 0)
    misses = tl.sum(unforeseen.to(tl.int32), 0)
    sixteenths = tl.load(share)
    all_of_them = misses + tl.sum(unbegun.to(tl.int32), 0)
    count = (all_of_them * sixteenths + SHARES // 2) // SHARES
    if now % _EVERY == 0:
        count = tl.minimum(count, all_of_them - 1)
    else:
        count = tl.maximum(count, (sixteenths >= _LEAST).to(tl.int32))
    order = tl.sum((unforeseen[None, :] & (turn[None, :] < turn[:, None])).to(tl.int32), 1)
    pairs = unforeseen & (order < count)
    from_last, all_unbegun = tl.zeros_like(guess), tl.sum(tl.where(unbegun, 1 << known, 0), 0)
    for later in tl.static_range(1, AHEAD):
        from_last += all_unbegun >> later & (guess < later).to(tl.int32)
    wanted = unbegun & (from_last < count - misses)
    # This knows no mask, but there is no claim of -1 chunks. Whoever began to copy meanwhile, goes on.
    there, then = tl.where(wanted, 0, -1), tl.full(guess.shape, GIVEN_UP, tl.int32)
    guesses = wanted & (tl.atomic_cas(claimed + known, there, then, sem="relaxed") == 0)
    return pairs, guesses


@triton.jit
def _post(handed, pair, chosen, layer, frame, activations, request, x, posted, COLUMNS: tl.constexpr):
    number = tl.load(posted) + 1
    for start in tl.static_range(0, COLUMNS, 2048):  # as many loads at once as registers allow
        column = start + tl.arange(0, 2048)
        inside = column < COLUMNS
        tl.store(x + column, tl.load(activations + column, mask=inside), mask=inside)
    tl.store(request + 2 + pair, tl.where(handed, frame, -1), mask=chosen)
    tl.store(request + 1, layer)
    tl.store(posted, number)
    tl.debug_barrier()  # one thread tells for all
    tl.atomic_xchg(request, number, sem="release", scope="sys")


@triton.jit
def wait_for_answer(posted, answered, heard):
    """Until the last request is answered; what the answer says may be read from here on, uncached.

    The first program of the grid looks, and tells the others. A step that never ends is the server's to
    notice.
    """
    number = tl.load(posted)
    if tl.program_id(0) + tl.program_id(1) == 0:
        while acquired_from_host(answered) != number:
            pass
        tl.atomic_xchg(heard, number, sem="release")
    else:
        lane = tl.zeros([32], tl.int32)
        while tl.max(acquired(heard + lane), 0) != number:
            pause()
