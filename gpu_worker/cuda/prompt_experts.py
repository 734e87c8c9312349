"""The routed experts of a prompt's chunk, by groups of experts: resident ones in place, others in waves.

The host learns a layer's choices and directory in one transfer, hands the resident experts to the kernel
where they lie, and streams the others through the staging ring, computing one wave while the next is on its
way. Slots in use stay as they are; free ones take the experts that the prompt used most. A chunk that needs
nearly every expert of a layer will need nearly every one of the next: these set out before it is known which.
Not done here: decode steps, the products themselves (`kernels.grouped_product`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from common.expert_key import ExpertKey
from common.record import RecordLayouts
from gpu_worker.cuda.device_slots import DeviceSlots
from gpu_worker.cuda.kernels.expert_groups import expert_groups
from gpu_worker.cuda.kernels.expert_products import Products, combine
from gpu_worker.cuda.kernels.grouped_product import GroupedExperts, Span
from gpu_worker.cuda.kernels.slots import ABSENT
from gpu_worker.cuda.staging_ring import StagingRing
from gpu_worker.cuda.step_experts import kernels_of
from gpu_worker.cuda.transfers import Download
from gpu_worker.slots.counters import CacheCounters

CALL_PAIRS = 8192  # of rows and experts in one call of the kernel, which takes memory for them
_NEARLY_ALL = 0.9  # of a layer's experts


@dataclass(frozen=True)
class _Expected:
    """A layer's choices, sorted by expert, and what the host wants to know of them."""

    layer: int
    positions: Tensor  # (pairs,) int64: those of expert e from starts[e] to starts[e + 1]
    told: Download  # starts, and the experts in the slots of this layer and the next


class PromptExperts:
    """Computes prompts over the slots' pool and a ring; for the engine's thread alone."""

    def __init__(
        self,
        layouts: RecordLayouts,
        cache: DeviceSlots,
        ring: StagingRing,
        ahead: bool,
        counters: CacheCounters,
    ) -> None:
        """`ahead`: whether records may set out before they are known to be needed."""
        self._kernels = kernels_of(layouts, GroupedExperts)
        self._cache, self._ring, self._ahead, self._counters = cache, ring, ahead, counters
        self._expected: _Expected | None = None

    def expect(self, layer: int, choices: Tensor) -> None:
        """`compute` will be called with these; what the host must know of them is on its way from now on."""
        positions, starts = expert_groups(choices, self._cache.directory.slot_of.shape[1])
        residents = self._cache.directory.expert_of[layer : layer + 2]
        self._expected = _Expected(layer, positions, Download([starts, *residents]))

    def compute(self, layer: int, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """As `RoutedExperts.compute`, of what was expected last.

        Raises what `Fetcher.stage` raises; slots are as before then.
        """
        expected, self._expected = self._expected, None
        assert expected is not None and expected.layer == layer
        starts, *residents = expected.told.wait()
        spans = list(pairwise(starts))
        needed = [expert for expert, (start, end) in enumerate(spans) if end > start]
        slot_of = {expert: slot for slot, expert in enumerate(residents[0]) if expert != ABSENT}
        resident = [expert for expert in needed if expert in slot_of]
        missing = [expert for expert in needed if expert not in slot_of]
        keys = [ExpertKey(layer, expert) for expert in missing]
        ahead = len(self._ring.here.intersection(keys))
        counted = self._counters.layers[layer]
        counted.hits += len(resident) + ahead
        counted.misses += len(missing) - ahead
        self._ring.fill(keys)  # before anything is computed: these are on their way meanwhile

        kernel, k = self._kernels[layer], choices.shape[1]
        prepared = kernel.prepare(x)
        products = torch.empty(choices.numel(), x.shape[1], device=x.device)

        def compute(experts: list[int], addresses: list[int]) -> None:
            chosen = [spans[expert] for expert in experts]
            for part in _parts(chosen):
                kernel(prepared, addresses[part], chosen[part], expected.positions, k, products)

        pool, settling = self._cache.pool[layer], _settling(residents[0], missing, spans)
        # By address: views of a hundred slots take the host 0.1 ms more, and the device waits meanwhile.
        start, stride = pool.data_ptr(), pool.stride(0)
        compute(resident, [start + slot_of[expert] * stride for expert in resident])
        for wave in self._ring.waves(keys):
            experts = [key.expert for key, _ in wave]
            compute(experts, [record.data_ptr() for _, record in wave])
            for expert, (_, record) in zip(experts, wave, strict=True):
                if expert in settling:
                    pool[settling[expert]].copy_(record)
        if settling:
            self._cache.settle(layer, settling)
        if self._ahead and len(residents) > 1 and len(needed) >= _NEARLY_ALL * len(spans):
            absent = sorted(set(range(len(spans))).difference(residents[1]))
            self._ring.fill((ExpertKey(layer + 1, expert) for expert in absent), ahead=True)
        nothing = torch.zeros_like(x)
        return combine(Products(products), weights, nothing, nothing)


def _parts(spans: Sequence[Span]) -> Iterator[slice]:
    """Runs of experts of up to CALL_PAIRS pairs together, but of one expert at least."""
    first = pairs = 0
    for index, (start, end) in enumerate(spans):
        if index > first and pairs + end - start > CALL_PAIRS:
            yield slice(first, index)
            first, pairs = index, 0
        pairs += end - start
    yield slice(first, len(spans))


def _settling(experts: Sequence[int], missing: list[int], spans: Sequence[Span]) -> dict[int, int]:
    """Free slots for those of `missing` that were used most: slot by expert, from a layer's experts by slot.

    Policies give up the lower of equal slots first, so the less used get these.
    """
    free = [slot for slot, expert in enumerate(experts) if expert == ABSENT]
    most = sorted(missing, key=lambda expert: spans[expert][0] - spans[expert][1])[: len(free)]
    return dict(zip(reversed(most), free, strict=False))
