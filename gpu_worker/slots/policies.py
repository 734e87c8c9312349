"""Which slot to give up: the replacement policies.

Both work on small integers alone (a clock that counts steps, a count of uses), so that another
implementation, on another device, takes the same decisions hit for hit. Ties go to the lower slot.

Uses are an expert's, not its stay's: counted again from each arrival, they favour whoever stays for having
stayed. They are halved now and then, or what was popular once would keep its slot when the text has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

FADING = 512  # steps of a layer, after which the uses of its experts are halved, rounded up
RETIRED = -(1 << 30)  # the last use of what is to go next


@dataclass
class Usage:
    """What a policy knows of a slot's record: the step of its last use, and the uses of its expert."""

    last_used: int
    uses: int


# Takes (clock, (slot, usage) pairs of the slots that may go); returns the slot to give up.
Policy = Callable[[int, Iterable[tuple[int, Usage]]], int]


def lru(clock: int, candidates: Iterable[tuple[int, Usage]]) -> int:
    """Least recently used."""
    return min(candidates, key=lambda slot: (slot[1].last_used, slot[0]))[0]


def lfru(clock: int, candidates: Iterable[tuple[int, Usage]]) -> int:
    """Least frequently recently used: the fewest uses for its age, in steps.

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
