"""Copying ahead: the kernel against its plain twin, and what becomes of a guess."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_worker.cuda.kernels import orders as copying
from gpu_worker.cuda.kernels import prefetch
from gpu_worker.cuda.kernels import slots as kernels
from gpu_worker.cuda.kernels.orders import AHEAD, Orders, chunks_of
from gpu_worker.cuda.kernels.slots import ABSENT, Awaited, Directory
from gpu_worker.slots.policies import POLICIES
from tests.gpu_worker.cuda.kernels.test_slots import EXPERTS, LAYERS, STRIDE, awaited, directory, moved

State = tuple[Directory, Awaited, Orders]


def frames(device: torch.device) -> torch.Tensor:
    return torch.arange(LAYERS * EXPERTS, dtype=torch.int32, device=device).view(LAYERS, EXPERTS)


def empty(slots: int, device: torch.device) -> State:
    """Nothing in any slot, nothing awaited."""
    state = directory(slots, 0, 0)
    for column in (state.slot_of, state.expert_of):
        column.fill_(ABSENT)
    return on_device(state, [], device)


def on_device(state: Directory, coming: list[int], device: torch.device) -> State:
    guesses, orders = awaited(state, coming)
    return (
        Directory(*moved(state, device)),
        Awaited(*moved(guesses, device)),
        Orders(*moved(orders, device)),
    )


def reserve(
    twin: object, state: State, first: int, predicted: list[list[int]], policy: str = "lru", on: int = 1
) -> None:
    """In place; for as many layers as there are lists."""
    device = state[0].clock.device
    enabled = torch.tensor([on], dtype=torch.int32, device=device)
    choices = torch.tensor(predicted, device=device)[:, None]
    twin(choices, first, policy, *state, frames(device), enabled, STRIDE)  # type: ignore[operator]


def resolve(state: State, layer: int, choices: list[int]) -> list[int]:
    device = state[0].clock.device
    slot_ids = torch.full((len(choices),), ABSENT, dtype=torch.int32, device=device)
    chosen = torch.tensor([choices], device=device)
    kernels.resolve(chosen, layer, "lru", *state, frames(device), slot_ids, STRIDE)
    return slot_ids.tolist()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    slots=st.integers(1, 48),
    largest=st.sampled_from([0, 1, 3, 20, 10**6]),
    predicted=st.integers(1, 16).flatmap(
        lambda k: st.lists(
            st.lists(st.integers(0, EXPERTS - 1), min_size=k, max_size=k), min_size=1, max_size=2
        )
    ),
    coming=st.lists(st.integers(0, EXPERTS - 1), max_size=4),
    begun=st.booleans(),
    on=st.sampled_from([1, 1, 1, 0]),
    seed=st.integers(0, 2**32),
)
def test_reserving(
    device: torch.device,
    policy: str,
    slots: int,
    largest: int,
    predicted: list[list[int]],
    coming: list[int],
    begun: bool,
    on: int,
    seed: int,
) -> None:
    """Of one or two layers, in the first of which something may be awaited already."""
    found, expected = (on_device(directory(slots, largest, seed), coming, device) for _ in range(2))
    for twin, state in ((prefetch.reserve, found), (prefetch.reserve_plain, expected)):
        if not begun:
            for column in (state[2].claimed, state[2].done):
                column[1, :AHEAD][state[1].expert[1] != ABSENT] = 0
        reserve(twin, state, 1, predicted, policy, on)
    for mine, plain in zip(found, expected, strict=True):
        assert [tensor.tolist() for tensor in mine] == [tensor.tolist() for tensor in plain]


@pytest.mark.parametrize("chosen", [7, 9])
def test_a_guess_is_chosen_or_given_up(device: torch.device, chosen: int) -> None:
    """Right, it is found in its slot with its record there; wrong, its slot is free."""
    arena = torch.randint(0, 256, (LAYERS * EXPERTS, STRIDE), dtype=torch.uint8)
    arena = arena.pin_memory() if device.type == "cuda" else arena
    base = torch.tensor([arena.data_ptr()], device=device)
    state = empty(2, device)
    pool = torch.zeros(LAYERS, 2, STRIDE, dtype=torch.uint8, device=device)
    reserve(prefetch.reserve, state, 1, [[7]])
    copying.copy(range(LAYERS), state[2], base, pool)
    assert torch.equal(pool[1, 0].cpu(), arena[EXPERTS + 7]) and not pool[1, 1].any()
    right = chosen == 7
    assert resolve(state, 1, [chosen]) == [0 if right else 1]
    assert state[0].expert_of[1].tolist() == ([7, ABSENT] if right else [ABSENT, 9])
    assert state[1].counters[1].tolist() == [1, int(right), STRIDE]
    assert state[0].counters[1].tolist() == ([1, 0] if right else [0, 1])
    copying.copy(range(1, 2), state[2], base, pool, wait=True)
    assert torch.equal(pool[1, 0 if right else 1].cpu(), arena[EXPERTS + chosen])
    assert torch.equal(state[2].done, state[2].due)


def test_a_better_prediction_takes_the_place_of_one_not_begun(device: torch.device) -> None:
    state = empty(8, device)
    reserve(prefetch.reserve, state, 1, [[7, 8], [5, 6]])
    assert [row[:2] for row in state[1].expert.tolist()[1:]] == [[7, 8], [5, 6]]
    state[2].claimed[1, 0] = 1
    reserve(prefetch.reserve, state, 1, [[9, 3]])
    assert state[1].expert[1].tolist() == [7, 9, 3, ABSENT], "7 had been begun"
    assert state[2].slot[1, :3].tolist() == [0, 1, 2]
    assert state[1].counters[:, 0].tolist() == [0, 3, 2]


def test_what_is_given_up_is_not_copied_on(device: torch.device) -> None:
    state = empty(2, device)
    base, pool = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(LAYERS, 2, STRIDE)
    pool = pool.to(device, torch.uint8)
    reserve(prefetch.reserve, state, 1, [[7]])
    resolve(state, 1, [7])
    reserve(prefetch.reserve, state, 1, [[8]])
    resolve(state, 1, [7])
    state[2].claimed[1, AHEAD:] = chunks_of(STRIDE)
    copying.copy(range(LAYERS), state[2], base, pool)  # from an address that cannot be read
    assert not pool.any() and state[1].counters[1].tolist() == [1, 1, STRIDE], "8 cost nothing"


def test_wrong_guesses_leave_room_for_a_step(device: torch.device) -> None:
    """However few slots there are."""
    for slots in range(2, 8):
        state = empty(slots, device)
        reserve(prefetch.reserve, state, 1, [[1, 2]])
        reserve(prefetch.reserve, state, 1, [[3, 4]])
        state[2].claimed.fill_(1)
        assert sorted({*resolve(state, 1, [5, 6])} - {ABSENT}) == sorted(resolve(state, 1, [5, 6]))
