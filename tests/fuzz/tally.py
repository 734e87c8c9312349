"""What became of the cases of one door."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts by outcome, and the faults: what must not be, with the case's number."""

    door: str
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def draw(self, number: int) -> random.Random:
        """What case `number` is made from."""
        return random.Random(f"{self.door} {self.seed} {number}")

    def outcome(self, name: str) -> None:
        self.outcomes[name] += 1

    def fault(self, number: int, text: str) -> None:
        self.outcomes["fault"] += 1
        self.faults.append(f"{self.door}, seed {self.seed}, case {number}: {text[:3000]}")
