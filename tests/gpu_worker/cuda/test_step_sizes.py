"""How many sequences a step has: whatever takes least for each of them, by a clock that tests turn."""

import logging
from collections.abc import Callable

import pytest
import torch

from gpu_worker.cuda import step_sizes
from gpu_worker.cuda.step_sizes import StepSizes

Cost = Callable[[int], float]  # seconds of a step of so many sequences


class Clock:
    """Of sizes 1, 2, 4 and 8, on a device whose steps end before they return."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(step_sizes.time, "perf_counter", lambda: self.now)
        self.sizes = StepSizes([1, 2, 4, 8], torch.device("cpu"))

    def decode(self, count: int, cost: Cost) -> list[int]:
        """One token for each of so many sequences."""
        divided = self.sizes.divide(count)
        for size in divided:
            self.step(size, cost)
        return divided

    def step(self, size: int, cost: Cost) -> None:
        with self.sizes.measuring(size):
            self.now += cost(size)
        self.now += 100  # between two steps anything may happen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def mostly_alike(size: int) -> float:
    return 1 + size / 8


def for_each_and_more(size: int) -> float:
    return size**1.5


@pytest.mark.parametrize(
    ("cost", "divided"),
    [
        (mostly_alike, {8: [8], 7: [4, 2, 1], 3: [2, 1], 1: [1], 11: [8, 2, 1]}),
        (for_each_and_more, {8: [1] * 8, 7: [1] * 7, 3: [1] * 3, 1: [1], 0: []}),
        (lambda size: {1: 3.0, 2: 5.0, 4: 9.0, 8: 40.0}[size], {8: [4, 4], 7: [4, 2, 1]}),
    ],
)
def test_the_sizes_that_take_least(clock: Clock, cost: Cost, divided: dict[int, list[int]]) -> None:
    """All are tried, the largest first, and then never those that take longer."""
    assert clock.sizes.divide(8) == [8]
    for _ in range(20):
        clock.decode(8, cost)
    for count, sizes in divided.items():
        assert clock.decode(count, cost) == sizes


@pytest.mark.parametrize("seconds", [10, 1000])
@pytest.mark.parametrize("size", [1, 8])
def test_a_step_that_had_to_wait_decides_nothing(clock: Clock, size: int, seconds: int) -> None:
    """As for a store that comes back; the fastest size, or another."""
    for _ in range(30):
        clock.decode(8, mostly_alike)
    for _ in range(2):
        clock.step(size, lambda size: seconds)
    assert clock.decode(8, mostly_alike) == [8]


def test_the_first_step_of_a_size_decides_nothing(clock: Clock) -> None:
    """It may compile kernels."""
    begun = set[int]()

    def cost(size: int) -> float:
        slow = size not in begun
        begun.add(size)
        return 1000 if slow else mostly_alike(size)

    for _ in range(12):
        clock.decode(8, cost)
    assert clock.decode(8, cost) == [8]


def test_what_was_slower_is_tried_again(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when what many sequences need is in slots by now: now and then, and only where it is possible."""
    monkeypatch.setattr(step_sizes, "_RETRY", 20)
    for _ in range(20):
        clock.decode(8, for_each_and_more)
    rounds = [clock.decode(8, for_each_and_more) for _ in range(60)]
    assert rounds.count([1] * 8) > 48 and rounds.count([8]) == 3
    assert all(clock.decode(1, for_each_and_more) == [1] for _ in range(60))
    for _ in range(80):
        clock.decode(8, mostly_alike)
    assert clock.decode(8, mostly_alike) == [8]


def test_a_size_that_nobody_asked_for_is_not_noted(clock: Clock) -> None:
    """Three of a step of four are left, if one has failed."""
    clock.step(3, lambda size: 0)
    assert clock.decode(3, mostly_alike) == [2, 1]


def test_a_change_is_told_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(40):
        clock.decode(8, for_each_and_more)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith(
        "decoding 1 at a time is fastest now; each takes 1000.10 ms of 1, 1414.26 ms of 2"
    )


def test_a_device_is_not_waited_for(clock: Clock) -> None:
    """A step that has not ended when the next is launched is not measured."""

    class Event:
        def record(self) -> None:
            pass

        def query(self) -> bool:
            return False

    clock.sizes._watch._begin = clock.sizes._watch._end = Event()
    for _ in range(9):
        assert clock.decode(8, mostly_alike) == [8]
