"""Copying ahead: the kernels against their plain twins, and what becomes of a guess."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_worker.cuda.kernels import prefetch
from gpu_worker.cuda.kernels import slots as kernels
from gpu_worker.cuda.kernels.slots import ABSENT, Awaited, Directory
from gpu_worker.slots.policies import POLICIES
from tests.gpu_worker.cuda.kernels.test_slots import EXPERTS, LAYERS, awaited, directory, misses, moved

STRIDE = 3 * 4096


def reserved(
    reserve: object, state: Directory, predicted: list[int], policy: str, on: int, device: torch.device
) -> tuple[Directory, Awaited]:
    after, ahead = Directory(*moved(state, device)), Awaited(*moved(awaited(state, 0), device))
    frame_of = torch.arange(LAYERS * EXPERTS, dtype=torch.int32, device=device).view(LAYERS, EXPERTS)
    enabled = torch.tensor([on], dtype=torch.int32, device=device)
    choices = torch.tensor([predicted], device=device)
    reserve(choices, 1, policy, after, ahead, frame_of, enabled)  # type: ignore[operator]
    return after, ahead


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    slots=st.integers(1, 48),
    largest=st.sampled_from([0, 1, 3, 20, 10**6]),
    predicted=st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=16),
    on=st.sampled_from([1, 1, 1, 0]),
    seed=st.integers(0, 2**32),
)
def test_reserving(
    device: torch.device, policy: str, slots: int, largest: int, predicted: list[int], on: int, seed: int
) -> None:
    state = directory(slots, largest, seed)
    found, expected = (
        reserved(twin, state, predicted, policy, on, device)
        for twin in (prefetch.reserve, prefetch.reserve_plain)
    )
    for mine, plain in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert mine.tolist() == plain.tolist()


def test_a_guess_is_chosen_or_given_up(device: torch.device) -> None:
    """Right, it is found in its slot with its record there; wrong, its slot is the next miss's."""
    frame_of = torch.arange(LAYERS * EXPERTS, dtype=torch.int32, device=device).view(LAYERS, EXPERTS)
    arena = torch.randint(0, 256, (LAYERS * EXPERTS, STRIDE), dtype=torch.uint8)
    arena = arena.pin_memory() if device.type == "cuda" else arena
    base = torch.tensor([arena.data_ptr()], device=device)
    for choice in (7, 9):
        empty = directory(2, 0, 0)
        for column in (empty.slot_of, empty.expert_of):
            column.fill_(ABSENT)
        after, ahead = reserved(prefetch.reserve, empty, [7], "lru", 1, device)
        pool = torch.zeros(LAYERS, 2, STRIDE, dtype=torch.uint8, device=device)
        prefetch.fetch_ahead(1, ahead, base, pool, blocks=2)
        assert torch.equal(pool[1, 0].cpu(), arena[EXPERTS + 7]) and not pool[1, 1].any()
        slot_ids = torch.full((1,), ABSENT, dtype=torch.int32, device=device)
        listed = kernels.Misses(*moved(misses(), device))
        kernels.resolve(
            torch.tensor([[choice]], device=device), 1, "lru", after, ahead, frame_of, slot_ids, listed
        )
        assert slot_ids.tolist() == [0] and after.expert_of[1].tolist() == [choice, ABSENT]
        right = choice == 7
        assert int(listed.length) == (0 if right else 1)
        assert ahead.counters[1].tolist() == [1, int(right), STRIDE]
        assert after.counters[1].tolist() == ([1, 0] if right else [0, 1])
        pool.zero_()
        prefetch.fetch_ahead(1, ahead, base, pool, blocks=2)
        assert bool(pool.any()) == right, "what was given up is not copied on"
