"""What the cache did and where its time went, counted while it happens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class LayerCounters:
    """Experts needed by a step of one layer and found in a slot, or not."""

    hits: int = 0
    misses: int = 0


@dataclass
class CacheCounters:
    """Since the start: experts found in a slot or not, layer by layer; what fetching moved.

    An expert counts once a step, however many rows chose it; but where a GPU holds all of them and looks none
    up, each row's choice counts. One that was copied ahead counts as found, even
    where the step had to wait for the rest of it; its bytes count as fetched, needed or not.
    """

    layers: list[LayerCounters] = field(default_factory=list)
    bytes_fetched: int = 0
    staged: int = 0  # misses that had to wait for the store's disk
    fetch_seconds: float = 0.0  # copying records and waiting for those that were staged
    compute_seconds: float = 0.0  # computing experts; not counted on a GPU
    misses_on_cpu: int = 0  # computed there by a GPU's worker, and not fetched

    @classmethod
    def of_layers(cls, layers: int) -> CacheCounters:
        """Nothing counted yet."""
        return cls([LayerCounters() for _ in range(layers)])

    def copy(self) -> CacheCounters:
        return self.plus(CacheCounters.of_layers(len(self.layers)))

    def since(self, earlier: CacheCounters) -> CacheCounters:
        return self._with(earlier, -1)

    def plus(self, other: CacheCounters) -> CacheCounters:
        return self._with(other, 1)

    def _with(self, other: CacheCounters, sign: int) -> CacheCounters:
        pairs = zip(self.layers, other.layers, strict=True)
        return CacheCounters(
            [LayerCounters(a.hits + sign * b.hits, a.misses + sign * b.misses) for a, b in pairs],
            self.bytes_fetched + sign * other.bytes_fetched,
            self.staged + sign * other.staged,
            self.fetch_seconds + sign * other.fetch_seconds,
            self.compute_seconds + sign * other.compute_seconds,
            self.misses_on_cpu + sign * other.misses_on_cpu,
        )

    @property
    def hits(self) -> int:
        return sum(layer.hits for layer in self.layers)

    @property
    def misses(self) -> int:
        return sum(layer.misses for layer in self.layers)

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
