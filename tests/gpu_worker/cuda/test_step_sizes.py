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


def test_one_step_that_took_long_decides_nothing(clock: Clock) -> None:
    for _ in range(30):
        clock.decode(8, mostly_alike)
    clock.step(8, lambda size: 10)
    assert clock.decode(8, mostly_alike) == [8]


def test_what_was_slower_is_tried_again(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when what many sequences need is in slots by now."""
    monkeypatch.setattr(step_sizes, "_RETRY", 200)
    for _ in range(20):
        clock.decode(8, for_each_and_more)
    assert clock.decode(8, mostly_alike) == [1] * 8
    for _ in range(40):
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
    assert len(told) == 1 and told[0].startswith(
        "decoding 1 at a time is fastest now; each takes 1000.00 ms of 1,"
    )


def test_a_device_is_not_waited_for(clock: Clock) -> None:
    """A step that has not ended when the next is launched is not measured."""

    class Event:
        def record(self) -> None:
            pass

        def query(self) -> bool:
            return False

    clock.sizes._watch._events = [Event(), Event()]
    for _ in range(3):
        assert clock.decode(8, mostly_alike) == [8]
    assert clock.sizes._tried[8] == 0
