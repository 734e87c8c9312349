"""The kernels of the slot cache against their plain twins, from any state that a directory can be in."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpu_worker.cuda.kernels import slots as kernels
from gpu_worker.cuda.kernels.orders import AHEAD, CHUNK, Orders, chunks_of, no_orders
from gpu_worker.cuda.kernels.slots import ABSENT, Awaited, Directory
from gpu_worker.slots.policies import FADING, POLICIES, RETIRED

LAYERS, EXPERTS, MAX_PAIRS = 3, 40, 128
MUCH = 2**31 - 3
STRIDE = 2 * 4 * CHUNK + 4096  # three chunks, the last of which may be short


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
    last_used = torch.randint(0, largest + 1, (LAYERS, slots), generator=draw)
    last_used[torch.rand(LAYERS, slots, generator=draw) < 0.1] = RETIRED
    uses = torch.randint(0, largest + 1, (LAYERS, EXPERTS), generator=draw)
    clock = torch.full((LAYERS,), largest)
    columns = (slot_of, expert_of, last_used, uses, clock)
    return Directory(*(column.int() for column in columns), counters=torch.zeros(LAYERS, 2, dtype=torch.long))


def awaited(state: Directory, coming: list[int]) -> tuple[Awaited, Orders]:
    """Of layer 1: experts on their way to free slots, as far as they are absent and there are some.

    One of two is wholly copied, the others have been begun.
    """
    guesses, orders = Awaited(*_nothing_awaited()), no_orders(LAYERS, MAX_PAIRS, torch.device("cpu"))
    free = (state.expert_of[1] == ABSENT).nonzero().flatten().tolist()
    absent = [expert for expert in dict.fromkeys(coming) if state.slot_of[1, expert] == ABSENT]
    for order, (expert, slot) in enumerate(zip(absent[:AHEAD], reversed(free), strict=False)):
        guesses.expert[1, order], orders.slot[1, order] = expert, slot
        orders.claimed[1, order] = orders.done[1, order] = chunks_of(STRIDE) if order % 2 else 1
        orders.due[1, order] = chunks_of(STRIDE)
    return guesses, orders


def _nothing_awaited() -> tuple[torch.Tensor, torch.Tensor]:
    expert = torch.full((LAYERS, AHEAD), ABSENT, dtype=torch.int32)
    return expert, torch.zeros(LAYERS, 3, dtype=torch.int64)


def moved(tensors: tuple[torch.Tensor, ...], device: torch.device) -> list[torch.Tensor]:
    return [tensor.clone().to(device) for tensor in tensors]


def resolved(
    twin: Callable[..., None],
    state: Directory,
    choices: torch.Tensor,
    policy: str,
    device: torch.device,
    coming: Sequence[int] = (),
) -> list:
    """All that a twin writes: directory, slot ids, what was awaited, what is ordered."""
    after = Directory(*moved(state, device))
    guesses, orders = awaited(state, list(coming))
    guesses, orders = Awaited(*moved(guesses, device)), Orders(*moved(orders, device))
    slot_ids = torch.full((MAX_PAIRS,), 99, dtype=torch.int32, device=device)
    frame_of = torch.arange(LAYERS * EXPERTS, dtype=torch.int32, device=device).view(LAYERS, EXPERTS).flip(0)
    tables = policy, after, guesses, orders, frame_of.contiguous()
    twin(choices.to(device), 1, *tables, slot_ids, STRIDE)
    return [tensor.tolist() for tensor in (*after, slot_ids, *guesses, *orders)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    slots=st.integers(1, 48),
    largest=st.sampled_from([0, 1, 3, 20, FADING - 1, 10**6, MUCH]),
    choices=st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=MAX_PAIRS),
    coming=st.lists(st.integers(0, EXPERTS - 1), max_size=6),
    seed=st.integers(0, 2**32),
)
# Products beyond int32, and fractions that floating point would not tell apart.
@example(policy="lfru", slots=16, largest=MUCH, choices=list(range(16)), coming=[3], seed=0)
@example(policy="lfru", slots=24, largest=FADING - 1, choices=[*range(16), 3], coming=[3, 20], seed=1)
def test_resolving(
    device: torch.device,
    policy: str,
    slots: int,
    largest: int,
    choices: list[int],
    coming: list[int],
    seed: int,
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


@pytest.mark.parametrize(("clock", "goes"), [(FADING - 1, 0), (FADING, 1)])
def test_who_goes_is_seen_once_uses_have_faded(device: torch.device, clock: int, goes: int) -> None:
    """4 uses and 3 are as many when they are halved, and then the lower slot goes."""
    state = directory(2, 0, 0)
    for column in (state.slot_of, state.expert_of, state.last_used):
        column.fill_(ABSENT)
    for slot, (expert, uses) in enumerate(((10, 4), (11, 3))):
        state.slot_of[1, expert], state.expert_of[1, slot], state.uses[1, expert] = slot, expert, uses
    state.clock.fill_(clock)
    for twin in (kernels.resolve, kernels.resolve_plain):
        written = resolved(twin, state, torch.tensor([20]), "lfru", device)
        assert written[6][0] == goes


def test_what_a_wrong_guess_left_is_nobodys(device: torch.device) -> None:
    """A copy may still write to its slot: it stays free. The copy is due as far as it was claimed."""
    state = directory(8, 0, 0)
    for column in (state.slot_of, state.expert_of):
        column.fill_(ABSENT)
    *directory_after, slot_ids, guessed, counted, _, _, claimed, _, due = resolved(
        kernels.resolve, state, torch.tensor([[9, 20, 21]]), "lru", device, coming=[7, 9, 8]
    )
    assert slot_ids[:3] == [6, 0, 1], "the second was chosen; the others had slots 7 and 5"
    assert directory_after[1][1] == [20, 21, ABSENT, ABSENT, ABSENT, ABSENT, 9, ABSENT]
    assert guessed[1] == [ABSENT] * AHEAD
    assert due[1][:3] == [1, chunks_of(STRIDE), 1] and claimed[1][0] > claimed[1][1] == chunks_of(STRIDE)
    assert counted[1] == [0, 1, STRIDE + 2 * (STRIDE // chunks_of(STRIDE))]
