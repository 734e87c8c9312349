"""Several workers on one store, in one process: one that floods, stands still or dies costs others little."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.arena import ArenaShape, OwnedArena
from common.checkpoint import PackedCheckpoint
from common.errors import Exhausted, NotFound
from common.expert_key import ExpertKey
from expert_store.frames import FrameTable
from expert_store.staging import READERS, Run, Stager
from expert_store.turns import Turns
from tests.helpers.models import make_hf_model, pack_model

LAYERS, EXPERTS, FRAMES = 2, 8, 6
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 30)), max_size=60))
def test_the_kth_key_of_a_lease_comes_after_at_most_k_turns_of_everybody(
    asked: list[tuple[int, int]],
) -> None:
    turns, place = Turns(), {}
    for lease, expert in asked:
        turns.add(lease, ExpertKey(0, expert))
        place[lease, expert] = turns.keys(lease).index(ExpertKey(0, expert)) + 1
    leases, served = len(list(turns)), 0
    while turns:
        lease = next(iter(turns))
        key = turns.keys(lease)[0]
        served += 1
        assert served <= place[lease, key.expert] * leases
        turns.take(lease, key)
        turns.end_turn(lease)
    assert served == len(place)


class Steps(Stager):
    """A stager that reads nothing and ends its reads, one by one, when the test says so."""

    def __init__(self, checkpoint: PackedCheckpoint, frames: FrameTable, leases: list[int]) -> None:
        super().__init__(checkpoint, frames, leases)
        self.begun: list[ExpertKey] = []
        self.asked: dict[tuple[int, ExpertKey], list[Exception | None]] = {}

    def advance(self) -> None:
        while len(self._reading) < READERS and (run := self._next_run()) is not None:
            self._reading.append(run)
            self.begun += run.keys

    def ask(self, lease: int, key: ExpertKey) -> None:
        """A demand that pins what it gets, as the miss loop does."""
        answers = self.asked.setdefault((lease, key), [])

        def on_staged(error: Exception | None) -> None:
            answers.append(error)
            if error is None:
                self.frames.pin(key, lease)
                assert self.frames.pinned_by(lease) <= self.share

        self.demand(lease, key, on_staged)

    def end_read(self, error: Exception | None = None) -> Run:
        run = self._reading.pop(0)
        for key in run.keys:
            self._settle(key, error)
        self.advance()
        return run

    def release(self, lease: int) -> None:
        self.frames.unpin_all(lease)
        self.released(lease)

    def served(self, lease: int) -> int:
        return sum(answers == [None] for (by, _), answers in self.asked.items() if by == lease)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    directory: Path = tmp_path_factory.mktemp("model")
    return pack_model(make_hf_model(directory / "hf"), directory / "packed")


@pytest.fixture
def leases() -> list[int]:
    return [1, 2]


@pytest.fixture
def stager(checkpoint: PackedCheckpoint, leases: list[int]) -> Iterator[Steps]:
    layout = checkpoint.layout
    arena = OwnedArena(ArenaShape(layout.digest, LAYERS, EXPERTS, FRAMES, layout.stride))
    stager = Steps(checkpoint, FrameTable(arena), leases)
    yield stager
    stager.close()
    arena.close()


def test_a_flood_of_demands_lets_others_have_every_second_read(stager: Steps) -> None:
    for key in KEYS[:12]:
        stager.ask(1, key)
    for key in KEYS[12:]:
        stager.ask(2, key)
    while stager._reading:
        stager.end_read()
        stager.release(1)
        stager.release(2)
    places = [stager.begun.index(key) + 1 for key in KEYS[12:]]
    assert places == [READERS + 2 * k for k in (1, 2, 3, 4)]
    assert (stager.served(1), stager.served(2)) == (12, 4)


def test_a_flood_of_hints_goes_after_demands_and_leaves_room_for_other_hints(stager: Steps) -> None:
    for key in KEYS[:10]:
        stager.hint(1, key)
    stager.hint(2, KEYS[12])
    stager.ask(2, KEYS[13])
    for _ in range(4):
        stager.end_read()
        stager.release(2)
    assert stager.begun.index(KEYS[13]) == READERS
    assert stager.begun.index(KEYS[12]) <= READERS + 2


def test_who_releases_nothing_holds_a_share_and_no_more(stager: Steps) -> None:
    for key in KEYS[:8]:
        stager.ask(1, key)
    for key in KEYS[8:]:
        stager.ask(2, key)
    while stager._reading:
        stager.end_read()
        stager.release(2)
    assert (stager.served(1), stager.served(2)) == (FRAMES // 2, 8)
    assert stager.frames.pinned_by(1) == FRAMES // 2


def test_what_is_ready_waits_for_room_too(stager: Steps) -> None:
    """Pins of READY frames count as any others, or a lease could hold them all."""
    for key in KEYS[:FRAMES]:
        stager.hint(2, key)
    while stager._reading:
        stager.end_read()
    for key in KEYS[:FRAMES]:
        stager.ask(1, key)
    assert stager.served(1) == FRAMES // 2
    stager.ask(1, KEYS[0])  # it pins that already
    assert stager.asked[1, KEYS[0]] == [None, None]
    stager.release(1)
    assert stager.served(1) == FRAMES - 1


def test_a_lease_that_ends_is_told_read_for_no_more_and_makes_room(stager: Steps, leases: list[int]) -> None:
    for key in KEYS[:8]:
        stager.ask(1, key)
    for key in KEYS[8:]:
        stager.ask(2, key)
    for _ in range(4):
        stager.end_read()
    begun = set(stager.begun)
    leases.remove(1)
    stager.frames.unpin_all(1)
    stager.drop(1)
    stager.released()
    while stager._reading:
        stager.end_read()
        stager.release(2)
    assert stager.served(2) == 8
    assert {key for key in stager.begun if key in KEYS[:8]} <= begun
    for (lease, _), answers in stager.asked.items():
        assert len(answers) == 1
        assert lease == 2 or answers == [None] or isinstance(answers[0], NotFound)


def test_demands_go_to_frames_that_have_memory(stager: Steps) -> None:
    """Shared memory is full: those frames are left out; when none has memory that is said at once, and tried
    again with the next demand."""
    full = Exhausted("no memory")
    stager.ask(1, KEYS[0])
    for _ in range(FRAMES - 1):
        assert not stager.asked[1, KEYS[0]]
        stager.end_read(full)
    stager.end_read()
    assert stager.served(1) == 1
    stager.release(1)
    stager.ask(1, KEYS[1])
    stager.end_read(full)
    assert stager.asked[1, KEYS[1]] == [full]
    stager.ask(1, KEYS[2])
    stager.end_read()
    assert stager.frames.usable == FRAMES and stager.served(1) == 2


@pytest.mark.parametrize("seed", range(20))
def test_random_leases_that_come_go_and_forget_to_release(
    stager: Steps, leases: list[int], seed: int
) -> None:
    """Every demand has one answer in the end, no lease holds more than its share, and no frame is lost."""
    rng = random.Random(seed)
    pending: set[tuple[int, ExpertKey]] = set()
    following = 3
    for _ in range(400):
        action = rng.choice(["ask", "ask", "ask", "read", "read", "release", "fail", "come", "go", "hint"])
        lease, key = rng.choice(leases), rng.choice(KEYS)
        if action == "ask" and (lease, key) not in stager.asked:
            stager.ask(lease, key)
        elif action == "hint":
            stager.hint(lease, key)
        elif action in ("read", "fail") and stager._reading:
            stager.end_read(OSError("unreadable") if action == "fail" else None)
        elif action == "release":
            stager.release(lease)
        elif action == "come" and len(leases) < 4:
            leases.append(following)
            following += 1
        elif action == "go" and len(leases) > 1:
            leases.remove(lease)
            stager.frames.unpin_all(lease)
            stager.drop(lease)
            stager.released()
        stager.frames.check_integrity()
        pending = {asked for asked, answers in stager.asked.items() if not answers}
        assert {lease for lease, _ in pending} <= set(leases)
    for _ in range(len(KEYS) * len(leases)):
        for lease in leases:
            stager.release(lease)
        if stager._reading:
            stager.end_read()
    assert all(len(answers) == 1 for answers in stager.asked.values())
