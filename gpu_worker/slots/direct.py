"""Routed experts computed from the store's own frames: on the CPU a READY frame serves as the slot itself.

Nothing is copied and nothing is cached here; the operating system shares the arena's pages between both
processes. An absent expert is staged, and computed while its frame is pinned for this worker. Results are
those of `routed_experts` bit for bit, since the kernels see the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.arena import MappedArena
from common.expert_key import ExpertKey
from common.record import RecordLayouts
from gpu_worker.kernels.expert_mlp import ExpertKernel, combine
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.slots.fetch import Fetcher, Take
from gpu_worker.slots.groups import Groups
from gpu_worker.slots.hints import Hints


class DirectExperts:
    """Implements `RoutedExperts` over the mapped arena; used by the engine's thread alone.

    A frame that was READY counts as a hit, an expert that had to be staged as a miss.
    """

    slots = 0  # there are none

    def __init__(self, layout: RecordLayouts, fetcher: Fetcher, hints: Hints) -> None:
        self.counters = CacheCounters.of_layers(len(layout.layers))
        self.hints = hints
        self._fetcher, self._stride = fetcher, layout.stride
        self._kernels = [ExpertKernel(layer) for layer in layout.layers]

    @property
    def pinned(self) -> int:
        return 0

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def wants_hints(self) -> bool:
        return self.hints.wanted()

    def describe(self) -> str:
        """Stands where a policy would."""
        return "direct"

    def hint(self, layer: int, choices: Tensor) -> None:
        """The next step of `layer` will probably choose these (rows, k)."""
        self.hints.send([ExpertKey(layer, expert) for expert in sorted(set(choices.flatten().tolist()))])

    def expect(self, layer: int, choices: Tensor) -> None:
        """Nothing is to be done: frames are used where they lie."""

    def compute(self, layer: int, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """x (rows, hidden), choices and weights (rows, k) to (rows, hidden), summed in rank order."""
        groups = Groups.of(choices)
        keys = [ExpertKey(layer, expert) for expert in groups.experts]
        positions = dict(zip(keys, groups.positions, strict=True))
        products = torch.empty(choices.numel(), x.shape[1])

        def run(arena: MappedArena, wanted: list[ExpertKey]) -> list[int]:
            def action(places: list[int], frames: list[Tensor]) -> None:
                with self.counters.computing():
                    chosen = [positions[wanted[place]] for place in places]
                    self._kernels[layer](frames, chosen, x, products)

            return arena.use(wanted, action)

        absent = [keys[place] for place in run(self._fetcher.arena, keys)]
        if absent:
            self._stage(absent, lambda arena, key: not run(arena, [key]))
        self.counters.layers[layer].hits += len(keys) - len(absent)
        self.counters.layers[layer].misses += len(absent)
        self.hints.note_misses(keys, set(absent))
        return combine(products, weights, x.dtype)

    def check_integrity(self) -> None:
        """Nothing is held between steps."""

    def _stage(self, absent: list[ExpertKey], take: Take) -> None:
        before = self.counters.compute_seconds
        with self.counters.fetching():
            self._fetcher.stage(absent, take)
        # What was computed between two replies is not waiting.
        self.counters.fetch_seconds -= self.counters.compute_seconds - before
        self.counters.staged += len(absent)
