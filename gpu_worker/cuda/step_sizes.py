"""How many sequences a step has: learned from what steps take.

A step of several reads the dense weights once, but needs the experts of all. Where these have to come over
the link, a step of eight can take longer than eight steps; and only some sizes are captured. So whoever has a
number of sequences asks for the sizes of the steps in which each has its turn. Not done here: whose turn.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

log = logging.getLogger(__name__)

_TRIED = 4  # steps of a size until its time is believed
_RETRY = 4096  # steps until all sizes are tried again
_WEIGHT = 1 / 8  # of a new step in a size's time, at least


class StepSizes:
    """For one engine's thread; `sizes` begin with 1, ascending."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self._sizes, self._watch = list(sizes), _Stopwatch(device)
        self._seconds = dict.fromkeys(sizes, 0.0)  # of a step
        self._tried = dict.fromkeys(sizes, 0)  # steps since all were to be tried
        self._steps, self._told = 0, 0

    def divide(self, count: int) -> list[int]:
        """The sizes of steps that decode `count` sequences once each."""
        self._note()
        divided = []
        while count:
            divided.append(self._best([size for size in self._sizes if size <= count]))
            count -= divided[-1]
        return divided

    @contextmanager
    def measuring(self, size: int) -> Iterator[None]:
        """The block launches a step of that size, the last one's results having been looked at."""
        self._note()
        if size not in self._seconds:
            yield
            return
        with self._watch.running(size):
            yield

    def _best(self, sizes: list[int]) -> int:
        """The size to be tried, the largest first; else the one that takes the least for a sequence."""
        untried = [size for size in sizes if self._tried[size] < _TRIED]
        return untried[-1] if untried else min(reversed(sizes), key=self._share)

    def _share(self, size: int) -> float:
        return self._seconds[size] / size

    def _note(self) -> None:
        """What the last step took."""
        for size, seconds in self._watch.read():
            self._tried[size] += 1
            weight = max(_WEIGHT, 1 / self._tried[size])
            self._seconds[size] += weight * (seconds - self._seconds[size])
            self._tell()
            self._steps += 1
            if self._steps % _RETRY == 0:
                self._tried = dict.fromkeys(self._sizes, 0)

    def _tell(self) -> None:
        """Of a size that is the fastest from now on, once all have been tried."""
        if min(self._tried.values()) < _TRIED:
            return
        best = self._best(self._sizes)
        if best != self._told:
            self._told = best
            shares = ", ".join(f"{1e3 * self._share(size):.2f} ms of {size}" for size in self._sizes)
            log.info("decoding %d at a time is fastest now; each takes %s", best, shares)


class _Stopwatch:
    """The time of one step after the other, by the device's own clock if it has one."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[Any] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._size, self._seconds = 0, 0.0

    @contextmanager
    def running(self, size: int) -> Iterator[None]:
        began = time.perf_counter()
        for event in self._events[:1]:
            event.record()
        yield
        for event in self._events[1:]:
            event.record()
        self._size, self._seconds = size, time.perf_counter() - began

    def read(self) -> Iterator[tuple[int, float]]:
        """Size and seconds of the last step, once, if it has ended."""
        if self._size and all(event.query() for event in self._events):
            seconds = self._seconds
            if self._events:
                seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
            yield self._size, seconds
        self._size = 0
