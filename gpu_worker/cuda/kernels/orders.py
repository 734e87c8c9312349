"""Orders to copy records from the arena to slots, and the kernel that works them off.

`slots.resolve` orders what a step lacks, `prefetch.reserve` what later layers will probably lack. Whoever
copies claims a chunk of the first order that has one left, of the nearest layer first: so several launches of
the kernel work side by side, and what is copied ahead gives way within a chunk to what is needed now. Chunks
are counted when they are claimed and again when they lie in the slot. A launch that waits, waits only for
chunks that running programs have claimed, so it cannot wait in vain; the kernel after it may begin at once
and wait slot by slot. Not done here: deciding what to copy.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.cuda.kernels.memory_order import acquired, pause, zero_after
from gpu_worker.cuda.kernels.overlap import let_next_begin, overlapping, wait_for_inputs
from gpu_worker.cuda.kernels.packed_words import INTERPRETED

# A launch has 256 KB on their way, which just fills a link of 50 GB/s. With twice as much, kernels beside it
# wait for their memory: a step of 1.69 ms took 0.22 ms longer instead of 0.02, measured on an H200.
PROGRAMS = 2 if INTERPRETED else 8
CHUNK = 1024 if INTERPRETED else 8192  # int32 words
_WARPS = 4
AHEAD = 4  # the first orders of a layer are guesses
GIVEN_UP = tl.constexpr(1 << 20)  # added to what is claimed, so that nothing is any more


class Orders(NamedTuple):
    """Copies to the slots of each layer, AHEAD guesses and then misses: (layers, orders) int32.

    An order is done when `done` is `due`. One that was given up is due as far as it had been claimed: its
    slot may be written to until then.
    """

    frame: Tensor  # where the record is in the arena
    slot: Tensor  # where it goes
    claimed: Tensor  # chunks, or more than there are; written last, for copying begins at once
    done: Tensor  # chunks
    due: Tensor  # chunks


class Coming(NamedTuple):
    """What a launch of `copy` that waits is seeing to."""

    orders: Orders
    layer: int


def no_orders(layers: int, misses: int, device: torch.device) -> Orders:
    """Room for AHEAD guesses and so many misses in each layer."""
    frame, slot, claimed, done, due = torch.zeros(
        5, layers, AHEAD + misses, dtype=torch.int32, device=device
    ).unbind()
    return Orders(frame, slot, claimed.fill_(GIVEN_UP.value), done, due)


def chunks_of(stride: int) -> int:
    """In how many chunks a record is copied."""
    return -(-stride // (4 * CHUNK))


def copy_plain(layers: range, orders: Orders, arena_base: Tensor, pool: Tensor, wait: bool = False) -> None:
    """Copy what is ordered for `layers` to pool (layers, slots, stride) uint8.

    arena_base (1,) int64 is the device's address of frame 0; frames lie a stride apart, a multiple of 4096.
    (The twin reads by the same address on the host, which is what unified addressing makes of it. It takes
    orders that nobody has begun, or done.) With `wait` all of it is there when the launch has ended, whoever
    copied it; a kernel that begins earlier, see `overlap`, asks by `wait_for_slot`.
    """
    stride = pool.shape[2]
    for layer in layers:
        for order in range(orders.claimed.shape[1]):
            if orders.claimed[layer, order] < chunks_of(stride):
                address = int(arena_base) + int(orders.frame[layer, order]) * stride
                record = torch.frombuffer((ctypes.c_uint8 * stride).from_address(address), dtype=torch.uint8)
                pool[layer, orders.slot[layer, order]].copy_(record)
                orders.claimed[layer, order] = orders.done[layer, order] = chunks_of(stride)


def copy(
    layers: range,
    orders: Orders,
    arena_base: Tensor,
    pool: Tensor,
    wait: bool = False,
    programs: int = PROGRAMS,
) -> None:
    """As `copy_plain`."""
    (_, slots, stride), count = pool.shape, orders.claimed.shape[1]
    _copy_kernel[(programs,)](
        layers.start, layers.stop, *orders, arena_base, pool.view(torch.int32), slots,
        ORDERS=count, LANES=lanes(len(layers) * count, _WARPS), WORDS=stride // 4, CHUNK=CHUNK, WAIT=wait,
        num_warps=_WARPS, **overlapping(),
    )  # fmt: skip


def lanes(count: int, warps: int) -> int:
    """For a kernel that looks at `count` things which others change meanwhile: at least a lane a thread.

    With fewer, several threads would each look for themselves, and find different things.
    """
    return max(32 * warps, triton.next_power_of_2(count))


@triton.jit
def order_copies(
    frame, slot, claimed, done, due, order, from_frame, to_slot, which, once, CHUNKS: tl.constexpr
):  # fmt: skip
    """Order copies, for `which` of the lanes; `once`: those of them that are alone with their order."""
    tl.store(frame + order, from_frame, mask=which)
    tl.store(slot + order, to_slot, mask=which)
    tl.store(done + order, 0, mask=which)
    tl.store(due + order, CHUNKS, mask=which)
    tl.debug_barrier()  # copying begins as soon as there is something to claim
    # A second time, and chunks that were claimed since would be claimed again.
    tl.atomic_xchg(claimed + order, 0, mask=once, sem="release")


@triton.jit
def wait_for_slot(order_slot, done, due, layer, slot, ORDERS: tl.constexpr, LANES: tl.constexpr):
    """Until nothing is on its way to a slot of the layer: 0, to be added to addresses that lie in it."""
    order = tl.arange(0, LANES)
    known = layer * ORDERS + tl.where(order < ORDERS, order, 0)
    so_far = acquired(done + known)  # before the others, so that these are not older
    its, chunks = (order < ORDERS) & (tl.load(order_slot + known) == slot), tl.load(due + known)
    coming = tl.max((its & (so_far < chunks)).to(tl.int32), 0)
    while coming > 0:
        pause()
        coming = tl.max((its & (acquired(done + known) < chunks)).to(tl.int32), 0)
    return zero_after(coming)


@triton.jit
def _first_open(claimed, order, exists, CHUNKS: tl.constexpr, NONE: tl.constexpr):
    """The first of the orders that has chunks nobody has claimed; NONE: there is none."""
    so_far = tl.load(claimed + order, mask=exists, other=CHUNKS, volatile=True)
    return tl.min(tl.where(so_far < CHUNKS, order, NONE), 0)


@triton.jit
def _undone(done, due, order, exists):
    """How many of the orders are not done; what was copied for the others can be read from here on."""
    known = tl.where(exists, order, 0)
    copied = acquired(done + known)
    return tl.sum((exists & (copied < tl.load(due + known))).to(tl.int32), 0)


# Numbers of layers and slots are no constants: each would be a kernel of its own, to be compiled at start.
@triton.jit(do_not_specialize=["first", "end", "slots"])
def _copy_kernel(
    first, end, frame, slot, claimed, done, due, arena_base, pool, slots,
    ORDERS: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
    WAIT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    let_next_begin(OVERLAP and WAIT)
    CHUNKS: tl.constexpr = (WORDS + CHUNK - 1) // CHUNK
    NONE: tl.constexpr = 1 << 30
    order, base = first * ORDERS + tl.arange(0, LANES), tl.load(arena_base)
    exists = order < end * ORDERS
    undone = _undone(done, due, order, exists) if WAIT else 1
    while undone > 0:
        mine = _first_open(claimed, order, exists, CHUNKS, NONE)
        while mine < NONE:
            chunk = tl.atomic_add(claimed + mine, 1, sem="acquire")
            if chunk < CHUNKS:
                address = base + tl.load(frame + mine).to(tl.int64) * (WORDS * 4)
                # The compiler cannot know how an address from memory is aligned; it must, to load 16 bytes.
                source = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
                place = (mine // ORDERS).to(tl.int64) * slots + tl.load(slot + mine)
                word = chunk * CHUNK + tl.arange(0, CHUNK)
                inside = word < WORDS
                tl.store(pool + place * WORDS + word, tl.load(source + word, mask=inside), mask=inside)
                tl.debug_barrier()  # one thread tells for all
                tl.atomic_add(done + mine, 1, sem="release")
            mine = _first_open(claimed, order, exists, CHUNKS, NONE)
        undone = _undone(done, due, order, exists) if WAIT else 0
