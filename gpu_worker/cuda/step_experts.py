"""What a decode step wants of routed experts, and how these are computed from slots.

Whoever fills the slots hands the same records to the same kernels, pair by pair, so that where a record lies
changes no bit. Not done here: the slots themselves (`device_slots`), combining the pairs, and prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from common.hlwq.planes import RAW_BITS
from common.record import RecordLayout, RecordLayouts
from gpu_worker.cuda.device_slots import DeviceSlots
from gpu_worker.cuda.kernels.expert_products import ExpertProducts
from gpu_worker.cuda.linear import Activations, squared_relu


class StepExperts(Protocol):
    """The routed experts of one step."""

    def products(self, layer: int, x: Activations, choices: Tensor) -> Tensor:
        """What expert choices[row, rank] makes of x's row: (rows * k, hidden) float32."""


class SlotKernels:
    """The experts of one layer, computed from slots."""

    def __init__(self, layout: RecordLayout) -> None:
        self._up, self._down = ExpertProducts(layout.up), ExpertProducts(layout.down)

    def __call__(self, x: Activations, pool: Tensor, slot_ids: Tensor, k: int) -> Tensor:
        """x's rows by the experts in slot_ids (rows * k,) int32 of pool (slots, stride)."""
        inner = self._up(_wanted(x, self._up), pool, slot_ids, k)
        activated = squared_relu(inner, self._down.layout.bits != RAW_BITS)
        return self._down(_wanted(activated, self._down), pool, slot_ids, 1)


def _wanted(x: Activations, projection: ExpertProducts) -> Tensor:
    form = x.plain if projection.layout.bits == RAW_BITS else x.rotated
    assert form is not None
    return form


class SlotSteps:
    """Implements `StepExperts` without the host: the device looks up, fetches and computes."""

    def __init__(self, layouts: RecordLayouts, cache: DeviceSlots) -> None:
        self._kernels, self._cache = kernels_of(layouts), cache

    def products(self, layer: int, x: Activations, choices: Tensor) -> Tensor:
        slot_ids = self._cache.resolve(layer, choices)
        self._cache.fetch(layer)
        return self._kernels[layer](x, self._cache.pool[layer], slot_ids.view(-1), choices.shape[1])


def kernels_of(layouts: RecordLayouts) -> Sequence[SlotKernels]:
    """One for each layer; layers of the same layout share one."""
    made = {layout: SlotKernels(layout) for layout in dict.fromkeys(layouts.layers)}
    return [made[layout] for layout in layouts.layers]
