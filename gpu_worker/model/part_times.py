"""Where a model's time goes, part by part, by the host's clock: on a GPU that is handing work over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from common.model_config import ATTENTION, MAMBA, MLP, MOE

LM_HEAD = "lm_head"


class PartTimes:
    """Seconds spent in blocks of each kind, their norms included, and in lm_head, since the start."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys((MAMBA, ATTENTION, MOE, MLP, LM_HEAD), 0.0)

    def __getitem__(self, part: str) -> float:
        return self._seconds[part]

    @contextmanager
    def spent_in(self, part: str) -> Iterator[None]:
        """Count the block's time as `part`'s."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - started

    def copy(self) -> PartTimes:
        return self.since(PartTimes())

    def since(self, earlier: PartTimes) -> PartTimes:
        times = PartTimes()
        times._seconds = {part: seconds - earlier[part] for part, seconds in self._seconds.items()}
        return times
