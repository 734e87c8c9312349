"""Which rows chose which expert: a step's choices, turned around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Positions = np.ndarray  # int64, flat positions row * k + rank


@dataclass(frozen=True)
class Groups:
    """For each chosen expert, ascending, the positions where it was chosen, ascending."""

    experts: list[int]
    positions: list[Positions]

    @classmethod
    def of(cls, choices: Tensor) -> Groups:
        """choices (rows, k) int64."""
        flat = choices.flatten().cpu().numpy()
        order = np.argsort(flat, kind="stable")
        chosen = flat[order]
        starts = np.flatnonzero(np.diff(chosen)) + 1
        experts = chosen[np.concatenate([[0], starts])].tolist()
        return cls(experts, np.split(order, starts))

    def select(self, experts: Sequence[int]) -> list[Positions]:
        """The positions of some of the experts, in the order asked for."""
        where = {expert: index for index, expert in enumerate(self.experts)}
        return [self.positions[where[expert]] for expert in experts]
