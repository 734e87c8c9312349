"""The frame table keeps its conservation law under any order of calls, and never evicts what is pinned."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.arena import ArenaShape, OwnedArena, State
from common.expert_key import ExpertKey
from expert_store.frames import FrameTable

SHAPE = ArenaShape("0" * 32, layers=2, experts=5, frames=3, stride=4096)
KEYS = st.builds(ExpertKey, st.integers(0, 1), st.integers(0, 4))
LEASES = st.integers(1, 3)


class FrameMachine(RuleBasedStateMachine):
    """Calls the table as a store would; the model is which experts are staging, ready and pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = OwnedArena(SHAPE)
        self.table = FrameTable(self.arena)
        self.usable = SHAPE.frames
        self.staging: set[ExpertKey] = set()
        self.pins: Counter[tuple[ExpertKey, int]] = Counter()

    def teardown(self) -> None:
        self.arena.close()

    def state(self, key: ExpertKey) -> State:
        return self.arena.entry(key).state

    def pinned(self) -> set[ExpertKey]:
        return {key for key, _ in +self.pins}

    @rule(key=KEYS, evict=st.booleans())
    def reserve(self, key: ExpertKey, evict: bool) -> None:
        if self.state(key) is not State.ABSENT:
            return
        ready = {k for k in self.keys() if self.state(k) is State.READY}
        room = self.usable > len(ready) + len(self.staging) or (evict and bool(ready - self.pinned()))
        frame = self.table.reserve(key, evict)
        assert (frame is not None) == room
        if frame is not None:
            self.staging.add(key)

    @precondition(lambda self: self.staging)
    @rule(data=st.data(), outcome=st.sampled_from(["publish", "publish", "abandon", "retire"]))
    def finish(self, data: st.DataObject, outcome: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.staging)))
        self.staging.remove(key)
        self.usable -= outcome == "retire"
        getattr(self.table, outcome)(key)

    @rule(key=KEYS, lease=LEASES)
    def pin(self, key: ExpertKey, lease: int) -> None:
        if self.state(key) is State.READY:
            self.table.pin(key, lease)
            self.pins[key, lease] += 1

    @rule(key=KEYS, lease=LEASES)
    def unpin(self, key: ExpertKey, lease: int) -> None:
        held = self.pins[key, lease] > 0
        assert self.table.unpin(key, lease) == held
        self.pins[key, lease] -= held

    @rule(lease=LEASES)
    def end_lease(self, lease: int) -> None:
        self.table.unpin_all(lease)
        for key in self.keys():
            self.pins[key, lease] = 0

    @rule(key=KEYS)
    def touch(self, key: ExpertKey) -> None:
        self.table.touch(key)

    @invariant()
    def conserved(self) -> None:
        self.table.check_integrity()
        assert self.table.pinned_count == len(self.pinned())
        for key in self.pinned():
            assert self.state(key) is State.READY, "a pinned expert was evicted"
        for lease in (1, 2, 3):
            assert self.table.pinned_by(lease) == len({key for key, by in +self.pins if by == lease})

    @staticmethod
    def keys() -> list[ExpertKey]:
        return [ExpertKey(layer, expert) for layer in range(2) for expert in range(5)]


TestFrames = FrameMachine.TestCase
TestFrames.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def table():
    arena = OwnedArena(SHAPE)
    yield FrameTable(arena)
    arena.close()


def test_the_least_recently_used_frame_leaves_first(table: FrameTable) -> None:
    keys = [ExpertKey(0, expert) for expert in range(3)]
    for key in keys:
        table.reserve(key)
        table.publish(key)
    table.touch(keys[0])
    table.reserve(ExpertKey(1, 0))
    assert [table.arena.entry(key).state for key in keys] == [State.READY, State.ABSENT, State.READY]
    assert table.evictions == 1


def test_an_entry_is_withdrawn_before_its_frame_is_given_away(table: FrameTable) -> None:
    """A reader that sees READY may trust the frame; so ABSENT must come before any write to it."""
    for expert in range(3):
        table.reserve(ExpertKey(0, expert))
        table.publish(ExpertKey(0, expert))
    generation = table.arena.entry(ExpertKey(0, 0)).generation
    assert table.reserve(ExpertKey(1, 1)) == 0
    withdrawn = table.arena.entry(ExpertKey(0, 0))
    assert withdrawn.state is State.ABSENT
    assert withdrawn.generation > generation
