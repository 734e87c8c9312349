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
from gpu_worker.cuda.kernels.expert_products import ExpertProducts, Products
from gpu_worker.cuda.kernels.lane import Lane
from gpu_worker.cuda.kernels.orders import Coming
from gpu_worker.cuda.kernels.router import routers, usable
from gpu_worker.cuda.linear import Activations, squared_relu
from gpu_worker.model.weights import RouterWeights

Kernels = TypeVar("Kernels")

DEPTH = 3  # layers that are guessed for


class StepExperts(Protocol):
    """The routed experts of one step."""

    def products(self, layer: int, x: Activations, choices: Tensor) -> Products:
        """What expert choices[row, rank] makes of x's row."""


class SlotKernels:
    """The experts of one layer, computed from slots."""

    def __init__(self, layout: RecordLayout) -> None:
        self._up, self._down = ExpertProducts(layout.up), ExpertProducts(layout.down)

    def __call__(
        self,
        x: Activations,
        pool: Tensor,
        slot_ids: Tensor,
        k: int,
        out: Tensor | None = None,
        coming: Coming | None = None,
    ) -> Tensor:
        """x's rows by the experts in slot_ids (rows * k,) of pool (slots, stride).

        Returns (rows * k, hidden) float32, or writes to `out`, where products of negative slot ids are left
        as they are. `coming`: see `ExpertProducts`.
        """
        inner = self._up(_wanted(x, self._up), pool, slot_ids, k, coming=coming)
        activated = squared_relu(inner, self._down.layout.bits != RAW_BITS)
        return self._down(_wanted(activated, self._down), pool, slot_ids, 1, out)


def _wanted(x: Activations, projection: ExpertProducts) -> Tensor:
    form = x.plain if projection.layout.bits == RAW_BITS else x.rotated
    assert form is not None
    return form


class SlotSteps:
    """Implements `StepExperts` without waiting for the host: the device looks up, fetches, also ahead, and
    computes; beside it the host may compute what it is handed over.

    Two branches run beside the step: guesses of what the next layers will choose, and the copies of those.
    The residual stream changes little from block to block, so a later layer's router mostly chooses from this
    layer's input what it will choose from its own; every layer on the way guesses again, and better.
    """

    def __init__(
        self,
        layouts: RecordLayouts,
        cache: DeviceSlots,
        gates: Sequence[RouterWeights],
        config: ModelConfig,
        ahead: bool,
        lane: Lane | None = None,
    ) -> None:
        """`gates`: the routers of all layers; `ahead`: whether to copy ahead at all; `lane`: for one row."""
        self._kernels, self._cache, self._config = kernels_of(layouts, SlotKernels), cache, config
        self._lane = lane
        able = ahead and not cache.holds_all and usable(config)
        self._gates = _stacked(gates) if able and len(gates) > 1 else None
        self._copies, self._guesses = (Branch(cache.pool.device, first=True) for _ in range(2))

    def can_guess(self, pairs: int) -> bool:
        """Whether something is copied ahead in steps of so many pairs of rows and experts."""
        return self._gates is not None and self._cache.can_guess(pairs)

    def products(self, layer: int, x: Activations, choices: Tensor) -> Products:
        pool, (rows, k) = self._cache.pool[layer], choices.shape
        if self._cache.holds_all:
            return Products(self._kernels[layer](x, pool, choices.view(-1), k))
        later = self._guessed(layer, choices.numel())
        if later:
            with self._guesses.beside():
                self._cache.reserve(later[0], self._predicted(later, x, choices))
            self._copies.after(self._guesses)
            with self._copies.beside():  # with this layer's, which it helps to fetch
                self._cache.fetch_ahead(range(layer, later.stop))
        lane = self._lane if rows == 1 else None
        slot_ids = self._cache.resolve(layer, choices, lane, x.rotated if lane else None).view(-1)
        coming = self._cache.fetch(layer)
        products = self._kernels[layer](x, pool, slot_ids, k, coming=coming)
        if later:
            # Before x is given up, which the guess reads, and before the next layer is resolved.
            self._guesses.join()
        elif self._guessed(layer - 1, choices.numel()):  # the last layer
            self._copies.join()
        return Products(products, lane, slot_ids)

    def _guessed(self, layer: int, pairs: int) -> range:
        """The layers whose choices are guessed from what this one reads, in a step of so many pairs."""
        if layer < 0 or not self.can_guess(pairs):
            return range(0)
        return range(layer + 1, min(layer + 1 + DEPTH, len(self._kernels)))

    def _predicted(self, layers: range, x: Activations, like: Tensor) -> Tensor:
        """What the routers of some layers make of an earlier layer's input."""
        assert x.plain is not None and self._gates is not None
        weight, bias = (gate[layers.start : layers.stop] for gate in self._gates)
        choices = like.new_empty(len(layers), *like.shape)
        routers(x.plain, weight, bias, self._config, choices, torch.empty_like(choices, dtype=torch.float32))
        return choices


def _stacked(gates: Sequence[RouterWeights]) -> tuple[Tensor, Tensor]:
    """Weights (layers, experts, hidden) and biases (layers, experts), of which `gates` become parts."""
    weight = torch.stack([gate.weight for gate in gates])
    bias = torch.stack([gate.e_score_correction_bias for gate in gates])
    for gate, its_weight, its_bias in zip(gates, weight, bias, strict=True):
        gate.weight.data, gate.e_score_correction_bias.data = its_weight, its_bias
    return weight, bias


def kernels_of(layouts: RecordLayouts, make: Callable[[RecordLayout], Kernels]) -> list[Kernels]:
    """One for each layer; layers of the same layout share one."""
    made = {layout: make(layout) for layout in dict.fromkeys(layouts.layers)}
    return [made[layout] for layout in layouts.layers]
