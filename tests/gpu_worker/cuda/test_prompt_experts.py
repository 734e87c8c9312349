"""Where a prompt's records come from: guesses, slots that stay and slots that fill, frames used again."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from common.checkpoint import PackedCheckpoint
from common.errors import Unavailable
from common.expert_key import ExpertKey
from gpu_worker.cuda import staging_ring
from gpu_worker.cuda.host_memory import RegisteredArena
from gpu_worker.cuda.record_copies import RecordCopies
from gpu_worker.cuda.staging_ring import StagingRing
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.slots.fetch import CountedFetch, Fetcher
from tests.helpers.device_engines import engine_of
from tests.helpers.engines import FixedLink, ScarceStore, full_arena
from tests.helpers.synth import make_synthetic

EXPERTS = 8
SHAPE: dict[str, Any] = {
    "pattern": "EE", "vocab_size": 64, "hidden_size": 64, "max_position_embeddings": 64,
    "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    return make_synthetic(tmp_path_factory.mktemp("model") / "synthetic", bits=16, **SHAPE)


@pytest.fixture(scope="module")
def link(checkpoint: PackedCheckpoint) -> Iterator[FixedLink]:
    with full_arena(checkpoint) as link:
        yield link


@pytest.fixture(autouse=True)
def small_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_ring, "WAVE", 2)
    monkeypatch.setattr(staging_ring, "GROUPS", 2)


def keys(layer: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


class Watched:
    """A ring over copies of `fetcher`'s arena, and what it fetched."""

    def __init__(self, fetcher: Fetcher, stride: int, device: torch.device) -> None:
        self.fetched: list[ExpertKey] = []
        self.counters = CacheCounters()  # of the ring alone, which knows no layers
        self.arena = fetcher.arena
        self.copies = RecordCopies(fetcher, RegisteredArena(fetcher.arena, device), fetcher.all_fit(), device)
        fetch = CountedFetch(self.copies.fetch, self.counters, lambda keys, staged: self.fetched.extend(keys))
        self.ring = StagingRing(self.copies, fetch, stride, device)

    def take(self, wanted: list[ExpertKey]) -> list[list[ExpertKey]]:
        """All waves of `wanted`, checked byte for byte."""
        waves = []
        for wave in self.ring.waves(wanted):
            for key, record in wave:
                assert torch.equal(record.cpu(), self.arena.frames[self.arena.entry(key).frame])
            waves.append([key for key, _ in wave])
        return waves


@pytest.fixture
def watched(checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device) -> Iterator[Watched]:
    watched = Watched(Fetcher(link), checkpoint.layout.stride, device)  # type: ignore[arg-type]
    try:
        yield watched
    finally:
        watched.copies.close()


def test_waves_go_round_the_ring(watched: Watched) -> None:
    wanted = keys(1, 7, 0, 3, 5, 2, 4, 1)
    assert watched.take(wanted) == [wanted[:2], wanted[2:4], wanted[4:6], wanted[6:]]
    assert watched.fetched == wanted
    assert watched.counters.bytes_fetched == 7 * watched.arena.shape.stride


def test_a_guess_is_used_as_far_as_it_was_right(watched: Watched) -> None:
    watched.ring.fill(keys(1, 0, 1, 2, 3, 4, 5), ahead=True)
    assert watched.fetched == keys(1, 0, 1, 2, 3), "as far as the ring reaches"
    assert watched.take(keys(1, 7, 6, 3, 0)) == [keys(1, 0), keys(1, 3), keys(1, 7, 6)]
    assert watched.ring.wasted_bytes == watched.ring.useful_bytes == 2 * watched.arena.shape.stride
    assert watched.fetched == keys(1, 0, 1, 2, 3, 7, 6), "nothing twice"


def test_a_guess_that_nobody_took_is_dropped(watched: Watched) -> None:
    """A prompt ends after a layer, by an error or a client that went away; the next begins at the first."""
    watched.ring.fill(keys(1, 0, 1, 2), ahead=True)
    assert watched.take(keys(0, 1, 5)) == [keys(0, 1, 5)]
    assert watched.ring.wasted_bytes == 3 * watched.arena.shape.stride
    assert watched.take([]) == []


def test_a_failed_fetch_leaves_the_ring_whole(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    waves = watched.ring.waves(keys(0, 0, 1, 2, 3, 4, 5))
    next(waves)

    def fail(wanted: object) -> None:
        raise Unavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(watched.ring, "_fetch", fail)
        with pytest.raises(Unavailable):
            next(waves)
    wanted = keys(0, 6, 7, 2, 0, 1)
    taken = watched.take(wanted)
    assert sorted(key for wave in taken for key in wave) == sorted(wanted)


def test_a_frame_reused_while_it_is_copied_is_staged_again(
    checkpoint: PackedCheckpoint, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ScarceStore(checkpoint, 2)
    watched = Watched(store, checkpoint.layout.stride, device)
    try:
        assert watched.copies.fetch([(keys(0, 3)[0], watched.ring._records[0, 0])]) == set(keys(0, 3))
        copy = watched.copies._copy

        def reused(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            copy(pairs)
            monkeypatch.undo()
            store.stage(keys(0, 6, 7), lambda arena, key: True)  # takes both frames
            pairs[0][1].zero_()  # what came of it

        monkeypatch.setattr(watched.copies, "_copy", reused)
        place = watched.ring._records[0, 1]
        assert watched.copies.fetch([(keys(0, 3)[0], place)]) == set(keys(0, 3))
        assert torch.equal(place, watched.ring._records[0, 0])
    finally:
        watched.copies.close()
        store.close()


def test_records_come_from_the_arena_of_a_stores_successor(
    checkpoint: PackedCheckpoint, device: torch.device
) -> None:
    first, second = ScarceStore(checkpoint, 2), ScarceStore(checkpoint, 3)
    watched = Watched(first, checkpoint.layout.stride, device)
    try:
        watched.take(keys(0, 1))
        first._link = second._link  # attached again, to another process
        second.stage(keys(1, 4), lambda arena, key: True)
        watched.arena = second.arena
        assert watched.take(keys(1, 4)) == [keys(1, 4)]
        assert watched.counters.staged == 1 and watched.copies.arena.mapped is second.arena
    finally:
        watched.copies.close()
        first.close()
        second.close()


def test_slots_in_use_stay_and_free_ones_take_what_was_used_most(
    checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device
) -> None:
    with engine_of(checkpoint, Fetcher(link), 4, device, eager=True) as engine:  # type: ignore[arg-type]
        experts, cache = engine.experts, engine.experts.cache
        choices = torch.tensor([[4, 6], [4, 1], [6, 4], [7, 2]], device=device)
        cache.resolve(0, torch.tensor([[6, 3]], device=device))
        cache.fetch(0)
        before = cache.snapshot()
        x, weights = torch.randn(4, 64, device=device), torch.full((4, 2), 0.5, device=device)
        experts.expect(0, choices)
        experts.compute(0, x, choices, weights)
        after = cache.snapshot()
        assert after[0].experts == [3, 6, 1, 4], "4 was used three times, and of equals the first is taken"
        assert after[0].last_used[:2] == before[0].last_used[:2] and after[1] == before[1]
        counted = experts.counters
        assert (counted.hits, counted.misses) == (1, 2 + 4)
        for slot, expert in enumerate(after[0].experts):
            frame = link.attachment.arena.entry(ExpertKey(0, expert)).frame
            assert torch.equal(cache.pool[0, slot].cpu(), link.attachment.arena.frames[frame])


def test_a_chunk_that_needs_nearly_all_starts_on_the_next_layer(
    checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device
) -> None:
    with engine_of(checkpoint, Fetcher(link), 2, device, eager=True) as engine:  # type: ignore[arg-type]
        experts = engine.experts
        x, weights = torch.randn(4, 64, device=device), torch.full((4, 2), 0.5, device=device)
        for choices, ahead in (([[0, 1], [2, 3], [0, 1], [2, 3]], 0), ([[0, 1], [2, 3], [4, 5], [6, 7]], 4)):
            chosen = torch.tensor(choices, device=device)
            experts.expect(0, chosen)
            before = experts.counters
            experts.compute(0, x, chosen, weights)
            counted = experts.counters.since(before)
            assert counted.bytes_fetched == (counted.misses + ahead) * checkpoint.layout.stride
        experts.expect(1, chosen)
        before = experts.counters
        experts.compute(1, x, chosen, weights)
        layer = experts.counters.since(before).layers[1]
        assert (layer.hits, layer.misses) == (ahead, 8 - ahead), "what was on its way counts as found"
