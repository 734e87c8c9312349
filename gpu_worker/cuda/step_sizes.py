"""How many sequences a step has: learned from what steps take.

A step of several reads the dense weights once, but needs the experts of all. Where these have to come over
the link, a step of eight can take longer than eight steps; and only some sizes are captured. So whoever has a
number of sequences asks for the sizes of the steps in which each has its turn. Not done here: whose turn.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

log = logging.getLogger(__name__)

_BELIEVED = 3  # measured steps, after a first one, which may compile or load something
_REMEMBERED = 5  # the last steps of a size, of which the median counts: one that had to wait says nothing
_RETRY = 512  # rounds until a size that would be possible, but is not the fastest, is measured once more
# What the host takes for a step beside the device: a token of one sequence took 1.74 ms through gRPC, its
# kernels 1.64, on an H200.
_HOST_SECONDS = 1e-4


class StepSizes:
    """For one engine's thread; `sizes` begin with 1, ascending."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self._sizes = {size: _Size() for size in sizes}
        self._watch, self._told = _Stopwatch(device), 0

    def divide(self, count: int) -> list[int]:
        """The sizes of steps that decode `count` sequences once each."""
        self._note()
        possible = [size for size in self._sizes if size <= count]
        for size in possible:
            self._sizes[size].rounds += 1
        divided = []
        while count:
            divided.append(self._next([size for size in possible if size <= count]))
            count -= divided[-1]
        return divided

    @contextmanager
    def measuring(self, size: int) -> Iterator[None]:
        """The block launches a step of that size, the last one's results having been looked at."""
        self._note()
        if size not in self._sizes:
            yield
            return
        with self._watch.running(size):
            yield

    def _next(self, sizes: Sequence[int]) -> int:
        """The largest that is to be measured, or else the one that takes the least for a sequence."""
        fastest = self._fastest(sizes)
        for size in reversed(sizes):
            known = self._sizes[size]
            if not known.believed or (size != fastest and known.rounds >= _RETRY):
                known.rounds = 0
                return size
        return fastest

    def _fastest(self, sizes: Sequence[int]) -> int:
        """Of equals, the largest."""
        return min(reversed(sizes), key=self._share)

    def _share(self, size: int) -> float:
        """Seconds of a step for each of its sequences."""
        return self._sizes[size].seconds / size

    def _note(self) -> None:
        """What the last step took."""
        for size, seconds in self._watch.read():
            self._sizes[size].add(seconds + _HOST_SECONDS)
            self._tell()

    def _tell(self) -> None:
        """Of a size that is the fastest from now on, once all are known."""
        if not all(size.believed for size in self._sizes.values()):
            return
        fastest = self._fastest(list(self._sizes))
        if fastest != self._told:
            self._told = fastest
            shares = ", ".join(f"{1e3 * self._share(size):.2f} ms of {size}" for size in self._sizes)
            log.info("decoding %d at a time is fastest now; each takes %s", fastest, shares)


class _Size:
    """What is known of steps of one size."""

    def __init__(self) -> None:
        self.rounds = 0  # in which it was possible, since it was last tried out
        self._begun = False
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def believed(self) -> bool:
        return len(self._recent) >= _BELIEVED

    @property
    def seconds(self) -> float:
        return statistics.median(self._recent) if self._recent else 0.0

    def add(self, seconds: float) -> None:
        if self._begun:
            self._recent.append(seconds)
        self._begun = True


class _Stopwatch:
    """The time of one step after the other, by the device's own clock if it has one."""

    def __init__(self, device: torch.device) -> None:
        self._begin: Any = None
        self._end: Any = None
        if device.type == "cuda":
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._size, self._seconds = 0, 0.0

    @contextmanager
    def running(self, size: int) -> Iterator[None]:
        began = time.perf_counter()
        if self._begin is not None:
            self._begin.record()
        yield
        if self._end is not None:
            self._end.record()
        self._size, self._seconds = size, time.perf_counter() - began

    def read(self) -> Iterator[tuple[int, float]]:
        """Size and seconds of the last step, once, if it has ended."""
        size, self._size = self._size, 0
        if not size:
            return
        if self._end is None:
            yield size, self._seconds
        elif self._end.query():
            yield size, self._begin.elapsed_time(self._end) / 1e3
