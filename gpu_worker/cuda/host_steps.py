"""Decode steps whose experts the host looks up: where the store lacks frames, or a step needs more than fit.

The slots, their directory, the policy and the kernels are those of the steps that the device drives: the host
reads a layer's directory together with the router's choices, decides as the device would, and puts the
directory back. A step that needs more experts than there are slots takes its pairs wave by wave. The host
waits for the device once a layer; nothing here can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from common.expert_key import ExpertKey
from common.model_config import ModelConfig
from common.record import RecordLayouts
from gpu_worker.cuda.device_slots import DeviceSlots, layer_state
from gpu_worker.cuda.kernels.expert_products import Products
from gpu_worker.cuda.kernels.slots import ABSENT
from gpu_worker.cuda.linear import Activations
from gpu_worker.cuda.record_copies import RecordCopies, now, wait_for
from gpu_worker.cuda.step_experts import SlotKernels, kernels_of
from gpu_worker.cuda.transfers import Download, upload
from gpu_worker.model.moe import route
from gpu_worker.model.weights import RouterWeights
from gpu_worker.slots.cache import LayerSlots
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.slots.fetch import CountedFetch
from gpu_worker.slots.hints import Hints
from gpu_worker.slots.policies import POLICIES
from gpu_worker.slots.waves import Places, waves


class HostSteps:
    """Implements `StepExperts` over the device's slots; for the engine's thread alone."""

    def __init__(
        self,
        layouts: RecordLayouts,
        cache: DeviceSlots,
        copies: RecordCopies,
        fetch: CountedFetch,
        counters: CacheCounters,
        hints: Hints,
        gates: Sequence[RouterWeights],
        config: ModelConfig,
    ) -> None:
        """`fetch` counts what `copies` does; `gates` are the routers of all layers, for hints."""
        self._layouts, self._kernels, self._cache = layouts, kernels_of(layouts, SlotKernels), cache
        self._copies, self._fetch, self._counters = copies, fetch, counters
        self._hints, self._gates, self._config = hints, gates, config

    def products(self, layer: int, x: Activations, choices: Tensor) -> Products:
        """See `StepExperts`. Raises what `Fetcher.stage` raises; what came until then stays resident."""
        asked = [choices, *self._cache.columns(layer)]
        hinted, resident = self._next_choices(layer, x), self._cache.directory.expert_of[layer + 1 :][:1]
        chosen, *columns, next_choices, there = Download([*asked, hinted, resident]).wait()
        absent = sorted(set(next_choices) - set(there))
        self._hints.send([ExpertKey(layer + 1, expert) for expert in absent])
        slots = LayerSlots.resumed(layer_state(*columns), POLICIES[self._cache.policy])
        hidden = self._layouts[layer].down.out_features
        products = torch.empty(len(chosen), hidden, device=choices.device)
        needed, fill = sorted(set(chosen)), partial(self._fill, layer)
        try:
            for wave in waves(slots, needed, self._counters.layers[layer], fill):
                slot_of = dict(wave)
                # Pairs of other waves are left alone.
                slot_ids = [slot_of.get(expert, ABSENT) for expert in chosen]
                pairs = upload(slot_ids, choices.device, torch.int32)
                self._kernels[layer](x, self._cache.pool[layer], pairs, choices.shape[1], products)
        finally:
            self._cache.restore(layer, slots.state())
        return Products(products)

    def _next_choices(self, layer: int, x: Activations) -> Tensor:
        """What the next layer's router makes of this layer's input, if hints are wanted: see `model.moe`."""
        assert x.plain is not None
        if layer + 1 == len(self._gates) or not self._hints.wanted():
            return torch.empty(0, dtype=torch.int64, device=x.plain.device)
        gate = self._gates[layer + 1]
        return route(x.plain, gate.weight, gate.e_score_correction_bias, self._config)[0]

    def _fill(self, layer: int, places: Places) -> None:
        """After the kernels that read what these slots held, and before those launched from now on."""
        pool = self._cache.pool[layer]
        self._copies.after(now(pool.device))
        self._fetch([(ExpertKey(layer, expert), pool[slot]) for expert, slot in places])
        wait_for(self._copies.done())
