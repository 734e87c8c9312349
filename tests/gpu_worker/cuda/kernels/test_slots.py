"""The kernels of the slot cache against their plain twins, from any state that a directory can be in."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpu_worker.cuda.kernels import slots as kernels
from gpu_worker.cuda.kernels.slots import ABSENT, Awaited, Directory, Misses
from gpu_worker.slots.policies import POLICIES

LAYERS, EXPERTS, MAX_PAIRS = 3, 40, 128
MUCH = 2**31 - 3


def directory(slots: int, largest: int, seed: int) -> Directory:
    """A part of the slots is taken, their usage is up to `largest`."""
    draw = torch.Generator().manual_seed(seed)
    expert_of = torch.full((LAYERS, slots), ABSENT)
    slot_of = torch.full((LAYERS, EXPERTS), ABSENT)
    for layer in range(LAYERS):
        taken = int(torch.randint(0, min(slots, EXPERTS) + 1, (), generator=draw))
        experts = torch.randperm(EXPERTS, generator=draw)[:taken]
        places = torch.randperm(slots, generator=draw)[:taken]
        expert_of[layer, places] = experts
        slot_of[layer, experts] = places
    last_used, uses = torch.randint(0, largest + 1, (2, LAYERS, slots), generator=draw)
    clock = torch.full((LAYERS,), largest)
    columns = (slot_of, expert_of, last_used, uses, clock)
    return Directory(*(column.int() for column in columns), counters=torch.zeros(LAYERS, 2, dtype=torch.long))


def misses() -> Misses:
    return Misses(*(torch.zeros(size, dtype=torch.int32) for size in (1, MAX_PAIRS, MAX_PAIRS)))


def awaited(state: Directory, expert: int) -> Awaited:
    """`expert` of layer 1 is on its way to a free slot, if it is absent and there is one."""
    expert_of = torch.full((LAYERS,), ABSENT, dtype=torch.int32)
    slot, frame, stop = torch.zeros(3, LAYERS, dtype=torch.int32)
    free = (state.expert_of[1] == ABSENT).nonzero().flatten().tolist()
    if free and expert != ABSENT and state.slot_of[1, expert] == ABSENT:
        expert_of[1], slot[1] = expert, free[-1]
    return Awaited(expert_of, slot, frame, stop, torch.zeros(LAYERS, 3, dtype=torch.int64))


def moved(tensors: tuple[torch.Tensor, ...], device: torch.device) -> list[torch.Tensor]:
    return [tensor.clone().to(device) for tensor in tensors]


def resolved(
    twin: Callable[..., None],
    state: Directory,
    choices: torch.Tensor,
    policy: str,
    device: torch.device,
    coming: int = ABSENT,
) -> list:
    """All that a twin writes: directory, slot ids, misses as far as they are valid, what was awaited."""
    after, listed = Directory(*moved(state, device)), Misses(*moved(misses(), device))
    ahead = Awaited(*moved(awaited(state, coming), device))
    slot_ids = torch.full((MAX_PAIRS,), 99, dtype=torch.int32, device=device)
    frame_of = torch.arange(LAYERS * EXPERTS, dtype=torch.int32, device=device).view(LAYERS, EXPERTS).flip(0)
    twin(choices.to(device), 1, policy, after, ahead, frame_of.contiguous(), slot_ids, listed)
    length = int(listed.length)
    written = (*after, slot_ids, listed.length, listed.frames[:length], listed.slots[:length], *ahead)
    return [tensor.tolist() for tensor in written]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    slots=st.integers(1, 48),
    largest=st.sampled_from([0, 1, 3, 20, 10**6, MUCH]),
    choices=st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=MAX_PAIRS),
    coming=st.integers(0, EXPERTS - 1),
    seed=st.integers(0, 2**32),
)
# Products beyond int32, and fractions that floating point would not tell apart.
@example(policy="lfru", slots=16, largest=MUCH, choices=list(range(16)), coming=3, seed=0)
def test_resolving(
    device: torch.device, policy: str, slots: int, largest: int, choices: list[int], coming: int, seed: int
) -> None:
    """Among them steps that do not fit: those too end in one and the same way."""
    state, chosen = directory(slots, largest, seed), torch.tensor(choices)
    found, expected = (
        resolved(twin, state, chosen, policy, device, coming)
        for twin in (kernels.resolve, kernels.resolve_plain)
    )
    assert found == expected


def test_an_expert_without_a_slot_has_none(device: torch.device) -> None:
    """Breaks the caller's promise; what fits is unharmed."""
    state = directory(2, 0, 0)
    written = resolved(kernels.resolve, state, torch.tensor([3, 2, 1, 0]), "lru", device)
    assert sorted(written[6][:4]) == [ABSENT, ABSENT, 0, 1]
    assert written[7] == [2]


@pytest.mark.parametrize("stride", [4096, 5 * 4096, 16384], ids=str)
@pytest.mark.parametrize("blocks", [1, 3])
def test_fetching(device: torch.device, stride: int, blocks: int) -> None:
    arena = torch.randint(0, 256, (7, stride), dtype=torch.uint8, pin_memory=device.type == "cuda")
    base = torch.tensor([arena.data_ptr()], device=device)
    for listed in ([], [(6, 0)], [(0, 3), (5, 1), (2, 2)]):
        work = Misses(*moved(misses(), device))
        work.length.fill_(len(listed))
        for entry, (frame, slot) in enumerate(listed):
            work.frames[entry], work.slots[entry] = frame, slot
        found, expected = (torch.zeros(2, 4, stride, dtype=torch.uint8, device=device) for _ in range(2))
        kernels.fetch(1, work, base, found, blocks)
        kernels.fetch_plain(1, work, base, expected)
        assert torch.equal(found, expected)
        assert int(found.any(2).sum()) == len(listed)
        assert all(torch.equal(found[1, slot].cpu(), arena[frame]) for frame, slot in listed)
