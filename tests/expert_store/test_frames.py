"""The frame table keeps its conservation law under any order of calls, and never evicts what is pinned."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.arena import ArenaShape, OwnedArena, State
from common.expert_key import ExpertKey
from expert_store.frames import PIN_LIMIT, FrameTable

SHAPE = ArenaShape("0" * 32, layers=2, experts=5, frames=3, stride=4096)
KEYS = st.builds(ExpertKey, st.integers(0, 1), st.integers(0, 4))
LEASES = st.integers(1, 3)


class FrameMachine(RuleBasedStateMachine):
    """Calls the table as a store would; the model is which experts are staging, ready and pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = OwnedArena(SHAPE)
        self.now = 0.0
        self.table = FrameTable(self.arena, clock=lambda: self.now)
        self.usable = SHAPE.frames
        self.staging: set[ExpertKey] = set()
        self.pins: dict[tuple[ExpertKey, int], float] = {}

    def teardown(self) -> None:
        self.arena.close()

    def state(self, key: ExpertKey) -> State:
        return self.arena.entry(key).state

    def pinned(self) -> set[ExpertKey]:
        return {key for key, _ in self.pins}

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
            self.pins[key, lease] = self.now

    @rule(key=KEYS, lease=LEASES)
    def unpin(self, key: ExpertKey, lease: int) -> None:
        held = self.pins.pop((key, lease), None) is not None
        assert self.table.unpin(key, lease) == held
        assert not self.table.pins(key, lease)

    @rule(lease=LEASES)
    def end_lease(self, lease: int) -> None:
        self.table.unpin_all(lease)
        self.pins = {pin: since for pin, since in self.pins.items() if pin[1] != lease}

    @rule(passed=st.floats(0, 2 * PIN_LIMIT))
    def end_old_pins(self, passed: float) -> None:
        self.now += passed
        young = {pin: since for pin, since in self.pins.items() if self.now - since <= PIN_LIMIT}
        assert self.table.end_old_pins() == len(self.pins) - len(young)
        self.pins = young

    @rule()
    def reinstate(self) -> None:
        self.table.reinstate()
        self.usable = SHAPE.frames

    @rule(key=KEYS)
    def touch(self, key: ExpertKey) -> None:
        self.table.touch(key)

    @invariant()
    def conserved(self) -> None:
        self.table.check_integrity()
        assert self.table.pinned_count == len(self.pinned())
        assert self.table.usable == self.usable
        for key in self.pinned():
            assert self.state(key) is State.READY, "a pinned expert was evicted"
        for lease in (1, 2, 3):
            assert self.table.pinned_by(lease) == len({key for key, by in self.pins if by == lease})

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


def test_a_pin_that_nobody_releases_ends(table: FrameTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for twice, an expert is pinned once, from the second time on."""
    now = 100.0
    monkeypatch.setattr(table, "_clock", lambda: now)
    old, young = ExpertKey(0, 0), ExpertKey(0, 1)
    for key in (old, young):
        table.reserve(key)
        table.publish(key)
        table.pin(key, lease=1)
    now += PIN_LIMIT
    table.pin(young, lease=1)
    assert table.end_old_pins() == 0
    now += 1
    assert table.end_old_pins() == 1
    assert (table.pins(old, 1), table.pins(young, 1)) == (False, True)
    assert table.unpin(young, lease=1) and not table.unpin(young, lease=1)
    table.check_integrity()
