"""How things are compared here: two sides in turn, in one process, ratios pair by pair.

The machine's speed drifts, so single times are worth little; the ratio of two runs that follow each other is
worth more, and the median of several such ratios with their spread is what is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """Ours against theirs: medians of a rate, and of the ratio ours / theirs with its spread."""

    what: str
    ours: str
    theirs: str
    unit: str
    our_rate: float
    their_rate: float
    ratio: float
    lowest: float
    highest: float
    goal: float  # the least ratio that is good enough

    @property
    def met(self) -> bool:
        return self.ratio >= self.goal

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class Figure:
    """One measured number that stands alone."""

    what: str
    value: float
    unit: str

    @classmethod
    def median(
        cls, what: str, action: Callable[[], object], amount: float, unit: str, times: int = 7
    ) -> Figure:
        """A rate: `amount` over the median of several times, after one warm-up."""
        measured = [seconds(action) for _ in range(times + 1)][1:]
        return cls(what, amount / statistics.median(measured), unit)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def compare(
    what: str,
    ours: tuple[str, Callable[[], object]],
    theirs: tuple[str, Callable[[], object]],
    amount: float,
    unit: str,
    goal: float,
    pairs: int = 7,
    prepare: Callable[[], object] = lambda: None,
) -> Comparison:
    """Run both sides `pairs` times in turn after one warm-up; rates are `amount` / seconds in `unit`.

    `prepare` runs untimed before each side.
    """
    our_times, their_times = [], []
    for _ in range(pairs + 1):
        for times, (_, action) in ((our_times, ours), (their_times, theirs)):
            prepare()
            times.append(seconds(action))
    return comparison(what, ours[0], theirs[0], our_times[1:], their_times[1:], amount, unit, goal)


def comparison(
    what: str,
    ours: str,
    theirs: str,
    our_times: list[float],
    their_times: list[float],
    amount: float,
    unit: str,
    goal: float,
) -> Comparison:
    """From times in seconds, pair by pair; a ratio above 1 means that ours is faster."""
    ratios = [b / a for a, b in zip(our_times, their_times, strict=True)]
    return Comparison(
        what,
        ours,
        theirs,
        unit,
        amount / statistics.median(our_times),
        amount / statistics.median(their_times),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        goal,
    )
