"""Which slot to give up: the replacement policies.

Both work on small integers alone (a clock that counts steps, a count of uses), so that another
implementation, on another device, takes the same decisions hit for hit. Ties go to the lower slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass
class Usage:
    """What a policy knows of a slot's record: the step of its last use, and its uses since it came."""

    last_used: int = 0
    uses: int = 0


# Takes (clock, (slot, usage) pairs of the slots that may go); returns the slot to give up.
Policy = Callable[[int, Iterable[tuple[int, Usage]]], int]


def lru(clock: int, candidates: Iterable[tuple[int, Usage]]) -> int:
    """Least recently used."""
    return min(candidates, key=lambda slot: (slot[1].last_used, slot[0]))[0]


def lfru(clock: int, candidates: Iterable[tuple[int, Usage]]) -> int:
    """Least frequently recently used: the fewest uses per step of age.

    Fractions are compared by cross-multiplication: a / b < c / d as a * d < c * b.
    """
    best: tuple[int, int, int] | None = None
    for slot, usage in candidates:
        age = clock - usage.last_used + 1
        if best is None or usage.uses * best[2] < best[1] * age:
            best = (slot, usage.uses, age)
    assert best is not None
    return best[0]


POLICIES: dict[str, Policy] = {"lru": lru, "lfru": lfru}
