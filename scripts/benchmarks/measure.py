"""How things are measured here: two sides in turn, ratios pair by pair; numbers that stand alone.

The machine's speed drifts, so single times are worth little; the ratio of two runs that follow each other is
worth more, and the median of several such ratios with their spread is what is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
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
    at_least: float | None  # the least ratio that is good enough; None: no goal was set

    @property
    def met(self) -> bool | None:
        return None if self.at_least is None else self.ratio >= self.at_least

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class Figure:
    """One measured number that stands alone, with the spread of what it is the median of."""

    what: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    lowest: float | None = None
    highest: float | None = None

    @classmethod
    def median(cls, what: str, values: Sequence[float], unit: str, at_least: float | None = None) -> Figure:
        """Of several measurements of one thing."""
        middle = statistics.median(values)
        return cls(what, middle, unit, at_least, lowest=min(values), highest=max(values))

    @property
    def met(self) -> bool | None:
        """None: no goal was set."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def rates(action: Callable[[], object], amount: float, times: int = 7) -> list[float]:
    """`amount` over the seconds of each of several runs, after one warm-up."""
    return [amount / seconds(action) for _ in range(times + 1)][1:]


def compare(
    what: str,
    ours: tuple[str, Callable[[], object]],
    theirs: tuple[str, Callable[[], object]],
    amount: float,
    unit: str,
    at_least: float | None,
    pairs: int = 7,
    prepare: Callable[[], object] = lambda: None,
) -> Comparison:
    """Run both sides `pairs` times in turn after one warm-up; rates are `amount` / seconds in `unit`.

    `prepare` runs untimed before each side.
    """
    our_times: list[float] = []
    their_times: list[float] = []
    for _ in range(pairs + 1):
        for times, (_, action) in ((our_times, ours), (their_times, theirs)):
            prepare()
            times.append(seconds(action))
    return comparison(what, ours[0], theirs[0], our_times[1:], their_times[1:], amount, unit, at_least)


def comparison(
    what: str,
    ours: str,
    theirs: str,
    our_times: Sequence[float],
    their_times: Sequence[float],
    amount: float,
    unit: str,
    at_least: float | None,
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
        at_least,
    )
