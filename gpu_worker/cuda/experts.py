"""The routed experts of a worker on a GPU: the slots, what they are filled from, and who drives a step.

Where the store keeps every expert in RAM and a step's experts fit the slots, the device drives: look-up,
fetch and computing are kernels of one captured step. The host drives every other step, over the same slots by
the same kernels, and all prompts. Not done here: any of it (`step_experts`, `host_steps`, `prompt_experts`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from common.expert_key import ExpertKey
from common.model_config import ModelConfig
from common.record import RecordLayouts
from gpu_worker.cuda.device_slots import DeviceSlots
from gpu_worker.cuda.fetch_ahead import FetchAhead
from gpu_worker.cuda.host_lane import HostLane
from gpu_worker.cuda.host_steps import HostSteps
from gpu_worker.cuda.prompt_experts import PromptExperts
from gpu_worker.cuda.record_copies import RecordCopies, wait_for
from gpu_worker.cuda.staging_ring import StagingRing
from gpu_worker.cuda.step_experts import SlotSteps, StepExperts
from gpu_worker.model.weights import RouterWeights
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.slots.fetch import CountedFetch
from gpu_worker.slots.hints import Hints, Prefetching


class DeviceExperts:
    """Implements `RoutedExperts` for prompts, and has `steps` for decode; for the engine's thread alone."""

    pinned = 0  # nothing is held between steps

    def __init__(
        self,
        layouts: RecordLayouts,
        cache: DeviceSlots,
        copies: RecordCopies,
        hints: Hints,
        gates: Sequence[RouterWeights],
        config: ModelConfig,
        lane: HostLane | None = None,
    ) -> None:
        """`gates`: the routers of all layers."""
        self.cache = cache
        self._copies, self._config = copies, config
        self._counters = CacheCounters.of_layers(config.num_layers)
        self._not_looked_up = 0  # choices of each layer that were hits before anybody asked
        fetch = CountedFetch(copies.fetch, self._counters, hints.note_misses)
        self.ring = StagingRing(copies, fetch, layouts.stride, cache.pool.device)
        ahead = self._by_device and hints.mode != "off"
        self._prompts = PromptExperts(layouts, cache, self.ring, ahead, self._counters)
        self._host = HostSteps(layouts, cache, copies, fetch, self._counters, hints, gates, config)
        self._lane = lane
        self._device = SlotSteps(layouts, cache, gates, config, ahead, lane.tensors if lane else None)
        able = self._device.can_guess(config.num_experts_per_tok)
        self._hints, self._ahead = hints, FetchAhead(hints.mode, cache, self.ring, able)
        if self._by_device:
            cache.attach(copies.arena.address, copies.arena.frame_of)
        if self._by_device and cache.holds_all:
            self._load_all()

    @property
    def hints(self) -> Prefetching:
        """What is fetched before it is needed: into slots by the device, or into frames by the store."""
        return self._ahead if self._by_device else self._hints

    @property
    def slots(self) -> int:
        """Slots in each layer."""
        return self.cache.pool.shape[1]

    @property
    def nbytes(self) -> int:
        return self.cache.pool.nbytes + self.ring.nbytes

    @property
    def counters(self) -> CacheCounters:
        """Of steps, which the device counts, and of what the host drove; waits for the device."""
        counters = self.cache.counters().plus(self._counters)
        for layer in counters.layers:
            layer.hits += self._not_looked_up
        if self._lane is not None:
            counters.misses_on_cpu = int(self._lane.tensors.computed.sum())
            counters.bytes_fetched -= counters.misses_on_cpu * self.cache.pool.shape[2]
        return counters

    @property
    def wants_hints(self) -> bool:
        return not self._copies.full and self._hints.wanted()

    def describe(self) -> str:
        """The policy in force, and who follows it for one sequence."""
        return f"{self.cache.policy}, decided on the {'device' if self.device_drives(1) else 'host'}"

    def device_drives(self, rows: int) -> bool:
        """Whether steps of so many sequences need nothing of the host."""
        pairs = rows * self._config.num_experts_per_tok
        return self._by_device and min(pairs, self._config.n_routed_experts) <= self.slots

    def before_step(self, rows: int) -> None:
        """Before every step that the device drives, once the last one's results were looked at."""
        self._ahead.before_step()
        if self._lane is not None and rows == 1:
            self._lane.wake()
        if self.cache.holds_all:  # then nothing is looked up, nor counted on the device
            self._not_looked_up += rows * self._config.num_experts_per_tok

    def steps(self, rows: int) -> StepExperts:
        """What computes the experts of a step of so many sequences."""
        return self._device if self.device_drives(rows) else self._host

    def hint(self, layer: int, choices: Tensor) -> None:
        """A prompt's next layer will probably choose these (rows, k)."""
        slot_of = self.cache.directory.slot_of[layer].tolist()
        experts = sorted(set(choices.flatten().tolist()))
        self._hints.send([ExpertKey(layer, expert) for expert in experts if slot_of[expert] < 0])

    def expect(self, layer: int, choices: Tensor) -> None:
        self._prompts.expect(layer, choices)

    def compute(self, layer: int, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """A prompt's: see `RoutedExperts`."""
        return self._prompts.compute(layer, x, choices, weights)

    def start_counting(self) -> None:
        """Forget what steps have counted so far; between steps."""
        self.cache.start_counting()
        if self._lane is not None:
            self._lane.tensors.computed.zero_()

    def check_integrity(self) -> None:
        self.cache.check_integrity()

    def close(self) -> None:
        try:
            self._copies.close()  # waits for the device
        finally:
            if self._lane is not None:
                self._lane.close()

    def _load_all(self) -> None:
        """Every expert into the slot of its number, for steps that look nothing up."""
        for layer, pool in enumerate(self.cache.pool):
            self._copies.fetch([(ExpertKey(layer, expert), record) for expert, record in enumerate(pool)])
            self.cache.settle(layer, {expert: expert for expert in range(len(pool))})
        wait_for(self._copies.done())

    @property
    def _by_device(self) -> bool:
        return self._copies.full and not self._copies.one_by_one
