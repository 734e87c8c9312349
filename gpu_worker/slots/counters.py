"""What the cache did and where its time went, counted while it happens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace


@dataclass
class CacheCounters:
    """Since the start: experts needed by a step and found in a slot, or not; what fetching moved.

    An expert counts once a step, however many rows chose it. One that was copied ahead counts as found, even
    where the step had to wait for the rest of it; its bytes count as fetched, needed or not.
    """

    hits: int = 0
    misses: int = 0
    bytes_fetched: int = 0
    staged: int = 0  # misses that had to wait for the store's disk
    fetch_seconds: float = 0.0  # copying records and waiting for those that were staged
    compute_seconds: float = 0.0  # computing experts; not counted on a GPU

    def copy(self) -> CacheCounters:
        return replace(self)

    def since(self, earlier: CacheCounters) -> CacheCounters:
        return CacheCounters(
            *(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self))
        )

    def plus(self, other: CacheCounters) -> CacheCounters:
        return CacheCounters(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Count the block's time as fetching."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.fetch_seconds += time.perf_counter() - started

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Count the block's time as computing."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.compute_seconds += time.perf_counter() - started
