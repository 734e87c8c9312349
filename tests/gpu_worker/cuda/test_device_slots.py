"""The slot cache on the device takes the host's decisions, hit for hit and slot for slot."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_worker.cuda.branch import Branch
from gpu_worker.cuda.device_slots import DeviceSlots
from gpu_worker.cuda.kernels.orders import CHUNK
from gpu_worker.cuda.kernels.slots import ABSENT
from gpu_worker.slots.cache import LayerSlots, LayerState
from gpu_worker.slots.counters import LayerCounters
from gpu_worker.slots.policies import FADING, POLICIES, Policy

EXPERTS, RANKS, STRIDE = 40, 6, 4096


class HostSlots:
    """The twin: `LayerSlots` driven as `SlotExperts` does for a step that fits."""

    def __init__(self, layers: int, slots: int, policy: Policy) -> None:
        self.layers = [LayerSlots(slots, EXPERTS, policy) for _ in range(layers)]
        self.hits = self.misses = 0

    def resolve(self, layer: int, choices: torch.Tensor) -> list[list[int]]:
        slots, needed = self.layers[layer], sorted(set(choices.flatten().tolist()))
        slots.begin(needed)
        hits = [expert for expert in needed if slots.lookup(expert) is not None]
        missing = [expert for expert in needed if slots.lookup(expert) is None]
        self.hits, self.misses = self.hits + len(hits), self.misses + len(missing)
        for expert in hits:
            slots.touch(expert)
            slots.pin(expert)
        for expert in missing:
            slots.reserve(expert)
        for expert in missing:
            slots.publish(expert)
        for expert in hits:
            slots.unpin(expert)
        return [[slots.place(expert) for expert in row] for row in choices.tolist()]

    def snapshot(self) -> list[LayerState]:
        return [slots.state() for slots in self.layers]


def arena_of(
    layers: int, device: torch.device, seed: int = 0, stride: int = STRIDE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (layers * EXPERTS, stride) of distinct bytes, and whose they are: (layers, EXPERTS)."""
    draw, count = torch.Generator().manual_seed(seed), layers * EXPERTS
    frame_of = torch.randperm(count, generator=draw).view(layers, EXPERTS)
    arena = torch.empty(count, stride, dtype=torch.uint8, pin_memory=device.type == "cuda")
    arena.view(torch.int32)[frame_of.flatten()] = torch.arange(count, dtype=torch.int32)[:, None]
    return arena, frame_of


def device_slots(layers: int, slots: int, policy: str, device: torch.device) -> DeviceSlots:
    """Attached to a frame that all experts share."""
    made = DeviceSlots(layers, EXPERTS, slots, STRIDE, policy, 4 * RANKS, device)
    made.attach(shared_frame(device).data_ptr(), torch.zeros(layers, EXPERTS))
    return made


@cache
def shared_frame(device: torch.device) -> torch.Tensor:
    return torch.zeros(STRIDE, dtype=torch.uint8, pin_memory=device.type == "cuda")


def places_of(slots: DeviceSlots, layer: int, choices: torch.Tensor) -> list[list[int]]:
    """Resolves and fetches."""
    places = slots.resolve(layer, choices.to(slots.pool.device)).tolist()
    slots.fetch(layer)
    return places


def trace(layers: int, slots: int, seed: int, steps: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Layers in turn, 1 to 4 rows of RANKS experts, skewed, as many rows as the slots hold."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, EXPERTS + 1) ** -torch.rand(layers, 1, generator=draw).mul(2)
    weights = torch.stack([row[torch.randperm(EXPERTS, generator=draw)] for row in weights])
    for step in range(steps):
        layer, rows = step % layers, int(torch.randint(1, 5, (), generator=draw))
        choices = torch.multinomial(weights[layer].expand(rows, -1), RANKS, generator=draw)
        while len(choices.unique()) > slots:
            choices = choices[:-1]
        yield layer, choices


def check_records(device: DeviceSlots) -> None:
    """Every slot that holds an expert holds that expert's bytes."""
    for layer, state in enumerate(device.snapshot()):
        words = device.pool[layer].view(torch.int32)
        bounds = torch.stack(words.aminmax(dim=1), 1).tolist()
        for slot, expert in enumerate(state.experts):
            assert expert < 0 or bounds[slot] == [layer * EXPERTS + expert] * 2


def begin(here: DeviceSlots, host: HostSlots, clock: int, seed: int) -> None:
    """Both with free slots, at this time, and with uses that experts had before."""
    draw, slots = torch.Generator().manual_seed(seed), here.pool.shape[1]
    for layer in range(len(host.layers)):
        uses = torch.randint(0, clock + 1, (EXPERTS,), generator=draw).tolist()
        state = LayerState(clock, [ABSENT] * slots, [0] * slots, uses)
        here.restore(layer, state)
        host.layers[layer] = LayerSlots.resumed(state, POLICIES[here.policy])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    layers=st.integers(1, 3),
    slots=st.integers(RANKS, 32),
    clock=st.sampled_from([0, FADING - 3]),
    seed=st.integers(0, 2**32),
)
def test_decisions_are_the_hosts(
    device: torch.device, policy: str, layers: int, slots: int, clock: int, seed: int
) -> None:
    here, host = device_slots(layers, slots, policy, device), HostSlots(layers, slots, POLICIES[policy])
    begin(here, host, clock, seed)
    counted = here.counters()
    for layer, choices in trace(layers, slots, seed, steps=14):
        before = counted
        assert places_of(here, layer, choices) == host.resolve(layer, choices)
        assert here.snapshot() == host.snapshot()
        counted = here.counters()
        assert (counted.hits, counted.misses) == (host.hits, host.misses)
        assert counted.bytes_fetched == host.misses * STRIDE
        changed = counted.since(before).layers
        assert [n for n, counted_there in enumerate(changed) if counted_there != LayerCounters()] == [layer]
        here.check_integrity()


def test_slots_hold_the_records_of_their_experts(device: torch.device) -> None:
    here = device_slots(2, 10, "lru", device)
    arena, frame_of = arena_of(2, device)
    here.attach(arena.data_ptr(), frame_of)
    for layer, choices in trace(2, 10, seed=3, steps=20):
        places_of(here, layer, choices)
        check_records(here)
    assert here.counters().misses > 2 * 10, "nothing was evicted"


def higher_of_equals(policy: Policy) -> Policy:
    """The policy with its ties broken the other way: slots are shown to it under mirrored numbers."""

    def mirrored(clock: int, candidates) -> int:
        return -policy(clock, [(-slot, usage) for slot, usage in reversed(list(candidates))])

    return mirrored


@pytest.mark.parametrize("policy", POLICIES)
def test_ties_decide(device: torch.device, policy: str) -> None:
    """The traces above have ties: broken the other way, the decisions are others."""
    right, wrong = (HostSlots(2, 12, rule) for rule in (POLICIES[policy], higher_of_equals(POLICIES[policy])))
    here = device_slots(2, 12, policy, device)
    differs = 0
    for layer, choices in trace(2, 12, seed=1, steps=20):
        places = here.resolve(layer, choices.to(device)).tolist()
        assert places == right.resolve(layer, choices)
        differs += places != wrong.resolve(layer, choices)
    assert differs > 0


def restore(device: DeviceSlots, states: list[LayerState]) -> None:
    for layer, state in enumerate(states):
        device.restore(layer, state)


def resumed(device: DeviceSlots, policy: Policy) -> HostSlots:
    host = HostSlots(0, 1, policy)
    host.layers = [LayerSlots.resumed(state, policy) for state in device.snapshot()]
    return host


@pytest.mark.parametrize("policy", POLICIES)
def test_going_on_from_the_host(device: torch.device, policy: str) -> None:
    """A trace that the host began, and that moves to other slots half-way, goes on as if it had not.

    So does the host from what the device left.
    """
    host, here = HostSlots(2, 10, POLICIES[policy]), device_slots(2, 10, policy, device)
    for step, (layer, choices) in enumerate(trace(2, 10, seed=2, steps=24)):
        if step == 8:
            restore(here, host.snapshot())
        if step == 16:
            host = resumed(here, POLICIES[policy])
            here, before = device_slots(2, 10, policy, device), here
            restore(here, before.snapshot())
        places = host.resolve(layer, choices)
        if step >= 8:
            assert places_of(here, layer, choices) == places
            here.check_integrity()
    assert here.snapshot() == host.snapshot()


def test_settling_fills_free_slots_and_ages_with_the_last_step(device: torch.device) -> None:
    here = device_slots(2, 10, "lru", device)
    places_of(here, 1, torch.tensor([[3, 9, 4, 5, 8, 7]]))
    before = here.snapshot()
    here.settle(1, {20: 8, 30: 6})
    here.check_integrity()
    after = here.snapshot()
    assert after[0] == before[0]
    assert after[1].experts == [*before[1].experts[:6], 30, ABSENT, 20, ABSENT]
    assert (after[1].last_used[8], after[1].last_used[6]) == (1, 1)
    chosen = {3, 9, 4, 5, 8, 7, 20, 30}
    assert after[1].uses == [int(expert in chosen) for expert in range(EXPERTS)]
    assert places_of(here, 1, torch.tensor([[20, 30]])) == [[8, 6]]


@pytest.mark.gpu
def test_a_captured_step(device: torch.device) -> None:
    """Replayed with other choices in the same buffer, a graph goes on from what the last replay left."""
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    host, here = HostSlots(1, 10, POLICIES["lfru"]), device_slots(1, 10, "lfru", device)
    arena, frame_of = arena_of(1, device)
    here.attach(arena.data_ptr(), frame_of)
    rows = [choices[:1] for _, choices in trace(1, 10, seed=4, steps=20)]
    choices = rows[0].to(device)
    host.resolve(0, rows[0])
    here.resolve(0, choices)  # compiles, which a capture does not survive
    here.fetch(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        places = here.resolve(0, choices)
        here.fetch(0)
    for row in rows[1:]:
        choices.copy_(row)
        graph.replay()
        assert places.tolist() == host.resolve(0, row)
        assert here.snapshot() == host.snapshot()
        check_records(here)


@pytest.mark.parametrize(
    ("tables", "table", "change"),
    [
        ("directory", "slot_of", 2),
        ("directory", "expert_of", 2),
        ("directory", "last_used", 2),
        ("awaited", "expert", 3),
        ("orders", "done", 1),
    ],
)
def test_damage_is_noticed(device: torch.device, tables: str, table: str, change: int) -> None:
    here = device_slots(1, RANKS, "lru", device)
    places_of(here, 0, torch.arange(RANKS)[None])
    here.check_integrity()
    getattr(getattr(here, tables), table)[0, 3] += change
    with pytest.raises(AssertionError):
        here.check_integrity()


@pytest.mark.parametrize("captured", [False, True])
def test_copies_beside_a_step(device: torch.device, captured: bool) -> None:
    """Layers whose later choices are guessed, half of them wrongly, while what was guessed before is copied.

    Whatever is given up, begun or not, and wherever: each slot has the record of its expert.
    """
    if captured and device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    layers, slots, steps = 5, 12, 300 if device.type == "cuda" else 6
    chunks = 40 if device.type == "cuda" else 2
    here = DeviceSlots(layers, EXPERTS, slots, chunks * 4 * CHUNK, "lfru", RANKS, device)
    arena, frame_of = arena_of(layers, device, stride=chunks * 4 * CHUNK)
    here.attach(arena.data_ptr(), frame_of)
    guesses, copies = (Branch(device, first=True) for _ in range(2))
    draw = torch.Generator().manual_seed(5)
    choices = torch.zeros(layers, 1, RANKS, dtype=torch.int64, device=device)
    predicted = torch.zeros(layers, layers, 1, RANKS, dtype=torch.int64, device=device)

    def step() -> None:
        for layer in range(layers):
            if layer + 1 < layers:
                with guesses.beside():
                    here.reserve(layer + 1, predicted[layer, layer + 1 :])
                copies.after(guesses)
                with copies.beside():
                    here.fetch_ahead(range(layer, layers))
            here.resolve(layer, choices[layer])
            here.fetch(layer)
            guesses.join() if layer + 1 < layers else copies.join()

    replay = step
    if captured:
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    for _ in range(steps):
        drawn = torch.stack([torch.randperm(EXPERTS, generator=draw)[:RANKS] for _ in range(layers)])
        other = torch.stack([torch.randperm(EXPERTS, generator=draw)[:RANKS] for _ in range(layers**2)])
        right = torch.rand(layers, layers, 1, generator=draw) < 0.5
        choices.copy_(drawn[:, None])
        predicted.copy_(torch.where(right, drawn[None], other.view(layers, layers, RANKS))[:, :, None])
        replay()
        here.check_integrity()
        check_records(here)
    made, useful, _ = here.awaited.counters.sum(0).tolist()
    assert made > useful > 0
