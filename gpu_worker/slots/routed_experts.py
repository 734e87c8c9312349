"""The routed experts of every layer on the CPU, from slots, in waves when a step needs more than fit.

This is where a token meets the cache: look up, fetch what is missing, compute, combine in rank order. Each
(row, rank) product is computed alone from its expert's rows and combined afterwards, so that neither the
number of slots nor the order of waves can change a bit of the result. (`direct` does the same without slots,
from the frames themselves.)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from common.expert_key import ExpertKey
from common.record import RecordLayouts
from gpu_worker.kernels.expert_mlp import ExpertKernel, combine
from gpu_worker.slots.cache import LayerSlots
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.slots.fetch import CountedFetch, Fetcher
from gpu_worker.slots.groups import Groups
from gpu_worker.slots.hints import Hints
from gpu_worker.slots.policies import POLICIES
from gpu_worker.slots.waves import Places, waves


class SlotExperts:
    """Implements `RoutedExperts` over the slot pool; used by the engine's thread alone."""

    def __init__(
        self,
        layout: RecordLayouts,
        slots: int,
        experts: int,
        policy: str,
        fetcher: Fetcher,
        hints: Hints,
    ) -> None:
        """`slots` and `experts`: of each layer."""
        self.counters = CacheCounters.of_layers(len(layout.layers))
        self.layers = [LayerSlots(slots, experts, POLICIES[policy]) for _ in layout.layers]
        self.hints = hints
        self._policy_name = policy
        self._fetch = CountedFetch(fetcher.fetch, self.counters, hints.note_misses)
        self._kernels = [ExpertKernel(layer) for layer in layout.layers]
        # The pool is the weight tensor: kernels are handed slots, never copies.
        self.pool = torch.empty(len(layout.layers), slots, layout.stride, dtype=torch.uint8)

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

    def expect(self, layer: int, choices: Tensor) -> None:
        """Nothing is done: fetching would keep the host from the shared expert."""

    def compute(self, layer: int, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """x (rows, hidden), choices and weights (rows, k) to (rows, hidden), summed in rank order."""
        groups = Groups.of(choices)
        products = x.new_empty(choices.numel(), x.shape[1], dtype=torch.float32)
        fill = partial(self._fill, layer)
        for wave in waves(self.layers[layer], groups.experts, self.counters.layers[layer], fill):
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

    def _fill(self, layer: int, places: Places) -> None:
        self._fetch([(ExpertKey(layer, expert), self.pool[layer, slot]) for expert, slot in places])
