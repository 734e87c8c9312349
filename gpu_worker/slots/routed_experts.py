"""The routed experts of every layer, computed from slots, in waves when a step needs more than fit.

This is where a token meets the cache: look up, fetch what is missing, compute, combine in rank order. Each
(row, rank) product is computed alone from its expert's rows and combined afterwards, so that neither the
number of slots nor the order of waves can change a bit of the result. (`direct` does the same without slots,
from the frames themselves.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from common.expert_key import ExpertKey
from common.record import RecordLayouts
from gpu_worker.kernels.expert_mlp import ExpertKernel, combine
from gpu_worker.slots.cache import LayerSlots
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.slots.fetch import Fetcher
from gpu_worker.slots.groups import Groups
from gpu_worker.slots.hints import Hints
from gpu_worker.slots.policies import POLICIES


class SlotExperts:
    """Implements `RoutedExperts` over the slot pool; used by the engine's thread alone."""

    def __init__(
        self,
        layout: RecordLayouts,
        slots: int,
        policy: str,
        fetcher: Fetcher,
        hints: Hints,
        device: torch.device,
    ) -> None:
        self.counters = CacheCounters()
        self.layers = [LayerSlots(slots, POLICIES[policy]) for _ in layout.layers]
        self.hints = hints
        self._policy_name = policy
        self._layout, self._fetcher = layout, fetcher
        self._kernels = [ExpertKernel(layer) for layer in layout.layers]
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

    @property
    def slots(self) -> int:
        """Slots in each layer."""
        return self.layers[0].slots

    @property
    def pinned(self) -> int:
        return sum(layer.pinned for layer in self.layers)

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes

    def describe(self) -> str:
        """The policy in force."""
        return self._policy_name

    def compute(self, layer: int, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """x (rows, hidden), choices and weights (rows, k) to (rows, hidden), summed in rank order."""
        groups = Groups.of(choices)
        products = x.new_empty(choices.numel(), x.shape[1], dtype=torch.float32)
        for wave in self._waves(layer, groups.experts):
            records = [self.pool[layer, slot] for _, slot in wave]
            with self.counters.computing():
                positions = groups.select([expert for expert, _ in wave])
                self._kernels[layer](records, positions, x, products)
        return combine(products, weights, x.dtype)

    def check_integrity(self) -> None:
        """To be called between steps: conservation, and nothing pinned."""
        for slots in self.layers:
            slots.check_integrity()
            assert slots.pinned == 0, "a slot is still pinned between steps"

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
            with self.counters.fetching():
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
