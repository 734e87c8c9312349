"""The routed experts of every layer, computed from slots, in waves when a step needs more than fit.

This is where a token meets the cache: look up, fetch what is missing, compute, combine in rank order. Each
(row, rank) product is computed alone from its expert's rows and combined afterwards, so that neither the
number of slots nor the order of waves can change a bit of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.expert_key import ExpertKey
from common.record import RecordLayouts
from gpu_worker.kernels.expert_mlp import expert_mlp
from gpu_worker.slots.cache import LayerSlots
from gpu_worker.slots.fetch import Fetcher
from gpu_worker.slots.hints import Hints
from gpu_worker.slots.policies import Policy


@dataclass
class CacheCounters:
    """Since the start: experts needed by a step and found in a slot, or not; what fetching moved."""

    hits: int = 0
    misses: int = 0
    bytes_fetched: int = 0
    staged: int = 0  # misses that had to wait for the store's disk

    def copy(self) -> CacheCounters:
        return replace(self)

    def since(self, earlier: CacheCounters) -> CacheCounters:
        return CacheCounters(
            self.hits - earlier.hits,
            self.misses - earlier.misses,
            self.bytes_fetched - earlier.bytes_fetched,
            self.staged - earlier.staged,
        )

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


class SlotExperts:
    """Implements `RoutedExperts` over the slot pool; used by the engine's thread alone."""

    def __init__(
        self,
        layout: RecordLayouts,
        slots: int,
        policy: Policy,
        fetcher: Fetcher,
        hints: Hints,
        device: torch.device,
    ) -> None:
        self.counters = CacheCounters()
        self.layers = [LayerSlots(slots, policy) for _ in layout.layers]
        self.hints = hints
        self._layout, self._fetcher = layout, fetcher
        # The pool is the weight tensor: kernels are handed slots, never copies.
        self.pool = torch.empty(len(layout.layers), slots, layout.stride, dtype=torch.uint8, device=device)

    @property
    def wants_hints(self) -> bool:
        return self.hints.wanted()

    def hint(self, layer: int, choices: Tensor) -> None:
        """The next step of `layer` will probably choose these (rows, k)."""
        experts = set(choices.flatten().tolist())
        missing = [ExpertKey(layer, e) for e in sorted(experts) if self.layers[layer].lookup(e) is None]
        self.hints.send(missing)

    def compute(self, layer: int, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """x (rows, hidden), choices and weights (rows, k) to (rows, hidden), summed in rank order."""
        rows, k = choices.shape
        groups = group_by_expert(choices)
        products = x.new_empty(rows * k, x.shape[1])
        for wave in self._waves(layer, list(groups)):
            for expert, slot in wave:
                pairs = groups[expert]
                products[pairs] = self._expert(layer, slot, x[pairs // k])
        products = products.view(rows, k, -1)
        total = products[:, 0].float() * weights[:, :1]
        for rank in range(1, k):
            total += products[:, rank].float() * weights[:, rank : rank + 1]
        return total.to(x.dtype)

    def check_integrity(self) -> None:
        """To be called between steps: conservation, and nothing pinned."""
        for slots in self.layers:
            slots.check_integrity()
            assert slots.pinned == 0, "a slot is still pinned between steps"

    def _expert(self, layer: int, slot: int, x: Tensor) -> Tensor:
        record, layout = self.pool[layer, slot], self._layout[layer]
        return expert_mlp(x, layout.up.view(record), layout.down.view(record))

    def _waves(self, layer: int, needed: list[int]) -> Iterator[list[tuple[int, int]]]:
        """Groups of (expert, slot), pinned while the caller computes from them; together all of `needed`."""
        slots = self.layers[layer]
        slots.tick()
        hits = [expert for expert in needed if slots.lookup(expert) is not None]
        misses = [expert for expert in needed if slots.lookup(expert) is None]
        self.counters.hits += len(hits)
        self.counters.misses += len(misses)
        for expert in hits:
            slots.touch(expert)
        if len(needed) <= slots.slots:
            yield from self._wave(layer, hits, misses)
            return
        # More than fit. What is resident is used in place first; a part of the misses then settles in free
        # slots, and the rest passes through a quarter of the slots, so the working set of decode survives.
        yield from self._wave(layer, hits, [])
        settling, passing = misses[: slots.free], misses[slots.free :]
        if settling:
            yield from self._wave(layer, [], settling)
        width = max(1, slots.slots // 4)
        for start in range(0, len(passing), width):
            group = passing[start : start + width]
            yield from self._wave(layer, [], group)
            for expert in group:
                slots.retire(expert)

    def _wave(self, layer: int, hits: list[int], misses: list[int]) -> Iterator[list[tuple[int, int]]]:
        slots, pinned = self.layers[layer], list(hits)
        for expert in hits:
            slots.pin(expert)
        try:
            self._fetch(layer, misses)
            for expert in misses:
                slots.pin(expert)
            pinned += misses
            if pinned:
                yield [(expert, slots.place(expert)) for expert in pinned]
        finally:
            for expert in pinned:
                slots.unpin(expert)

    def _fetch(self, layer: int, experts: list[int]) -> None:
        """Fill slots with `experts`; if that fails, none of them is resident."""
        if not experts:
            return
        slots = self.layers[layer]
        wanted = [(ExpertKey(layer, expert), slots.reserve(expert)) for expert in experts]
        try:
            staged = self._fetcher.fetch([(key, self.pool[layer, slot]) for key, slot in wanted])
        except BaseException:
            for expert in experts:
                slots.abandon(expert)
            raise
        for expert in experts:
            slots.publish(expert)
        self.counters.bytes_fetched += len(experts) * self._layout.stride
        self.counters.staged += len(staged)
        self.hints.note_misses([key for key, _ in wanted], staged)


def group_by_expert(choices: Tensor) -> dict[int, Tensor]:
    """For each chosen expert, ascending, the flat positions row * k + rank where it was chosen."""
    flat = choices.flatten()
    order = flat.argsort(stable=True)
    experts, counts = flat[order].unique_consecutive(return_counts=True)
    return dict(zip(experts.tolist(), order.split(counts.tolist()), strict=True))
