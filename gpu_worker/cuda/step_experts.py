"""What a decode step wants of routed experts, and how these are computed from slots.

Whoever fills the slots hands the same records to the same kernels, pair by pair, so that where a record lies
changes no bit. Not done here: the slots themselves (`device_slots`), combining the pairs, and prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from common.hlwq.planes import RAW_BITS
from common.model_config import ModelConfig
from common.record import RecordLayout, RecordLayouts
from gpu_worker.cuda.branch import Branch
from gpu_worker.cuda.device_slots import DeviceSlots
from gpu_worker.cuda.kernels.expert_products import ExpertProducts
from gpu_worker.cuda.kernels.router import router, usable
from gpu_worker.cuda.linear import Activations, squared_relu
from gpu_worker.model.weights import RouterWeights

Kernels = TypeVar("Kernels")


class StepExperts(Protocol):
    """The routed experts of one step."""

    def products(self, layer: int, x: Activations, choices: Tensor) -> Tensor:
        """What expert choices[row, rank] makes of x's row: (rows * k, hidden) float32."""


class SlotKernels:
    """The experts of one layer, computed from slots."""

    def __init__(self, layout: RecordLayout) -> None:
        self._up, self._down = ExpertProducts(layout.up), ExpertProducts(layout.down)

    def __call__(
        self, x: Activations, pool: Tensor, slot_ids: Tensor, k: int, out: Tensor | None = None
    ) -> Tensor:
        """x's rows by the experts in slot_ids (rows * k,) of pool (slots, stride).

        Returns (rows * k, hidden) float32, or writes to `out`, where products of negative slot ids are left
        as they are.
        """
        inner = self._up(_wanted(x, self._up), pool, slot_ids, k)
        activated = squared_relu(inner, self._down.layout.bits != RAW_BITS)
        return self._down(_wanted(activated, self._down), pool, slot_ids, 1, out)


def _wanted(x: Activations, projection: ExpertProducts) -> Tensor:
    form = x.plain if projection.layout.bits == RAW_BITS else x.rotated
    assert form is not None
    return form


class SlotSteps:
    """Implements `StepExperts` without the host: the device looks up, fetches, fetches ahead and computes.

    Two branches run beside the step: all copies, in the order in which layers need them, and the guesses of
    what to copy ahead. The residual stream changes little from block to block, so the next layer's router
    mostly chooses from this layer's input what it will choose from its own.
    """

    def __init__(
        self,
        layouts: RecordLayouts,
        cache: DeviceSlots,
        gates: Sequence[RouterWeights],
        config: ModelConfig,
        ahead: bool,
    ) -> None:
        """`gates`: the routers of all layers; `ahead`: whether to copy ahead at all."""
        self._kernels, self._cache, self._config = kernels_of(layouts, SlotKernels), cache, config
        self._gates = gates if ahead and usable(config) else ()
        self._copies, self._guesses = (Branch(cache.pool.device) for _ in range(2))

    def products(self, layer: int, x: Activations, choices: Tensor) -> Tensor:
        pool, k = self._cache.pool[layer], choices.shape[1]
        if self._cache.holds_all:
            return self._kernels[layer](x, pool, choices.view(-1), k)
        guessed = layer + 1 < len(self._gates)
        if guessed:
            with self._guesses.beside():
                self._cache.reserve(layer + 1, self._predicted(layer + 1, x, choices))
        slot_ids = self._cache.resolve(layer, choices)
        with self._copies.beside():
            self._cache.fetch(layer)
        self._copies.join()
        if guessed:
            self._copies.after(self._guesses)
            with self._copies.beside():
                self._cache.fetch_ahead(layer + 1)
        products = self._kernels[layer](x, pool, slot_ids.view(-1), k)
        if guessed:
            # Before x is given up, which the guess reads, and before the next layer is resolved.
            self._guesses.join()
        return products

    def _predicted(self, layer: int, x: Activations, like: Tensor) -> Tensor:
        """What the router of `layer` makes of an earlier layer's input."""
        assert x.plain is not None
        choices, weights = torch.empty_like(like), torch.empty_like(like, dtype=torch.float32)
        gate = self._gates[layer]
        router(x.plain, gate.weight, gate.e_score_correction_bias, self._config, choices, weights)
        return choices


def kernels_of(layouts: RecordLayouts, make: Callable[[RecordLayout], Kernels]) -> list[Kernels]:
    """One for each layer; layers of the same layout share one."""
    made = {layout: make(layout) for layout in dict.fromkeys(layouts.layers)}
    return [made[layout] for layout in layouts.layers]
