"""Copying what is ordered: by one launch or by several side by side, each chunk once."""

import pytest
import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels import orders as kernels
from gpu_worker.cuda.kernels.orders import AHEAD, CHUNK, Orders, chunks_of, no_orders

LAYERS, SLOTS, FRAMES, MISSES = 3, 4, 7, 5

# layer, order, frame, slot
LISTED = [[], [(1, AHEAD, 6, 0)], [(1, 0, 0, 3), (1, AHEAD + 2, 5, 1), (2, 1, 2, 2), (0, 0, 4, 0)]]


def ordered(listed: list[tuple[int, int, int, int]], stride: int, device: torch.device) -> Orders:
    orders = no_orders(LAYERS, MISSES, device)
    for layer, order, frame, slot in listed:
        orders.frame[layer, order], orders.slot[layer, order] = frame, slot
        orders.claimed[layer, order], orders.due[layer, order] = 0, chunks_of(stride)
    return orders


def arena_of(stride: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames of random bytes, and where the first of them is."""
    arena = torch.randint(0, 256, (FRAMES, stride), dtype=torch.uint8, pin_memory=device.type == "cuda")
    return arena, torch.tensor([arena.data_ptr()], device=device)


@pytest.mark.parametrize("stride", [4096, 5 * 4096, 4 * 4 * CHUNK], ids=str)
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("listed", LISTED, ids=len)
def test_copying(device: torch.device, stride: int, programs: int, listed: list) -> None:
    arena, base = arena_of(stride, device)
    found, expected = (torch.zeros(LAYERS, SLOTS, stride, dtype=torch.uint8, device=device) for _ in range(2))
    orders, plain = (ordered(listed, stride, device) for _ in range(2))
    kernels.copy(range(1, 3), orders, base, found, wait=True, programs=programs)
    kernels.copy_plain(range(1, 3), plain, base, expected)
    assert torch.equal(found, expected)
    assert torch.equal(orders.done, plain.done)
    assert not found[0].any(), "of another layer"
    assert all(torch.equal(found[layer, slot].cpu(), arena[f]) for layer, _, f, slot in listed if layer > 0)


def test_what_is_claimed_is_not_copied_again(device: torch.device) -> None:
    """Nor what was given up."""
    stride = 3 * 4 * CHUNK
    arena, base = arena_of(stride, device)
    orders = ordered([(0, 0, 1, 1), (0, 1, 2, 2)], stride, device)
    orders.claimed[0, 0] = orders.done[0, 0] = 1
    orders.claimed[0, 1], orders.due[0, 1] = 1 + kernels.GIVEN_UP.value, 0
    pool = torch.zeros(LAYERS, SLOTS, stride, dtype=torch.uint8, device=device)
    kernels.copy(range(1), orders, base, pool, wait=True)
    copied = pool[0, 1].cpu()
    assert not copied[: 4 * CHUNK].any() and torch.equal(copied[4 * CHUNK :], arena[1, 4 * CHUNK :])
    assert not pool[0, 2].any() and orders.done[0, :2].tolist() == [3, 0]


@triton.jit
def _next_order(claimed, found, count, CHUNKS: tl.constexpr, LANES: tl.constexpr, NONE: tl.constexpr):
    order = tl.arange(0, LANES)
    tl.store(found, kernels._first_open(claimed, order, order < count, CHUNKS, NONE))


@pytest.mark.parametrize(("claimed", "first"), [([3, 2, 0], 1), ([3, 4, 0], 2), ([3, 9, 3], 99)])
def test_the_first_that_has_chunks_left_is_next(device: torch.device, claimed: list[int], first: int) -> None:
    """Of the nearest layer, then: orders of layers lie one after the other."""
    found = torch.zeros(1, dtype=torch.int32, device=device)
    counts = torch.tensor([*claimed, 0], dtype=torch.int32, device=device)
    _next_order[(1,)](counts, found, 3, CHUNKS=3, LANES=128, NONE=99)
    assert found.tolist() == [first]


@triton.jit
def _waited(order_slot, done, due, layer, slot, found, ORDERS: tl.constexpr, LANES: tl.constexpr):
    tl.store(found, 1 + kernels.wait_for_slot(order_slot, done, due, layer, slot, ORDERS, LANES))


def test_who_waits_for_a_slot_waits_for_nothing_else(device: torch.device) -> None:
    """Neither for other slots, nor for what was given up, nor for another layer."""
    orders, found = no_orders(LAYERS, MISSES, device), torch.zeros(1, dtype=torch.int32, device=device)
    for layer, order, slot, done, due in [
        (1, 0, 2, 3, 3), (1, 1, 2, 1, 1), (1, AHEAD, 3, 1, 3), (0, 0, 2, 0, 3), (2, MISSES, 2, 0, 3),
    ]:  # fmt: skip
        orders.slot[layer, order], orders.done[layer, order], orders.due[layer, order] = slot, done, due
    columns = orders.slot, orders.done, orders.due
    _waited[(1,)](*columns, 1, 2, found, ORDERS=AHEAD + MISSES, LANES=32, num_warps=1)
    assert found.tolist() == [1]


@pytest.mark.gpu
def test_who_waits_for_a_slot_is_told(device: torch.device) -> None:
    """By a launch beside it that copies slowly."""
    if device.type != "cuda":
        pytest.skip("the interpreter runs one kernel after the other")
    stride, other = 200 * 4 * CHUNK, torch.cuda.Stream(device)
    arena, base = arena_of(stride, device)
    pool = torch.zeros(LAYERS, SLOTS, stride, dtype=torch.uint8, device=device)
    for _ in range(10):
        orders, found = ordered([(0, AHEAD, 5, 1)], stride, device), torch.zeros(1, dtype=torch.int32)
        found, there = found.to(device), torch.empty(stride, dtype=torch.uint8, device=device)
        pool.zero_()
        other.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(other):
            kernels.copy(range(1), orders, base, pool, programs=1)
        columns = orders.slot, orders.done, orders.due
        _waited[(1,)](*columns, 0, 1, found, ORDERS=AHEAD + MISSES, LANES=32, num_warps=1)
        there.copy_(pool[0, 1])
        assert torch.equal(there.cpu(), arena[5]) and found.tolist() == [1]
        torch.cuda.synchronize(device)


@pytest.mark.gpu
def test_launches_side_by_side(device: torch.device) -> None:
    """The one that waits has everything when it ends, whoever copied it."""
    if device.type != "cuda":
        pytest.skip("the interpreter runs one kernel after the other")
    stride = 40 * 4 * CHUNK
    arena, base = arena_of(stride, device)
    listed = [
        (layer, order, (layer + order) % FRAMES, order) for layer in range(LAYERS) for order in range(4)
    ]
    other = torch.cuda.Stream(device)
    for _ in range(50):
        orders, pool = ordered(listed, stride, device), torch.zeros(LAYERS, SLOTS, stride, dtype=torch.uint8)
        pool = pool.to(device)
        other.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(other):
            kernels.copy(range(LAYERS), orders, base, pool)
        kernels.copy(range(1), orders, base, pool, wait=True)
        there = pool[0].clone()
        torch.cuda.synchronize(device)
        assert all(torch.equal(there[order].cpu(), arena[order]) for order in range(4))
        assert torch.equal(orders.done, orders.due)
