"""The routed experts of a worker on a GPU: the slot cache, the arena it is filled from, and who drives it.

Where the store keeps every expert in RAM and a row's experts fit the slots, the device drives: look-up, fetch
and computing are kernels of one captured step. Prompts go through here by the host, expert by expert, and
read what is resident from its slot and everything else through a staging buffer, so that they leave decode's
working set alone. Not done here: stores that lack frames, which `gpu_worker.slots` serves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from common.record import RecordLayouts
from gpu_worker.cuda.device_slots import DeviceSlots
from gpu_worker.cuda.host_memory import RegisteredArena
from gpu_worker.cuda.kernels.slots import ABSENT
from gpu_worker.cuda.staging_buffer import StagingBuffer
from gpu_worker.cuda.step_experts import SlotSteps
from gpu_worker.kernels.expert_mlp import combine, expert_mlp
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.slots.groups import Groups
from gpu_worker.slots.hints import Hints

STAGED = 4  # records in each half of the staging buffer: 26 MB, half a millisecond of a PCIe 5 link


class DeviceExperts:
    """Implements `RoutedExperts` for prompts, and has `steps` for decode; for the engine's thread alone."""

    pinned = 0  # nothing is held between steps
    wants_hints = False  # every expert is in RAM

    def __init__(
        self, layouts: RecordLayouts, cache: DeviceSlots, arena: RegisteredArena, hints: Hints
    ) -> None:
        self.hints, self.cache = hints, cache
        self._layouts, self._arena = layouts, arena
        self.steps = SlotSteps(layouts, cache)
        self._staging = StagingBuffer(STAGED, layouts.stride, cache.pool.device)
        self._prompts = CacheCounters()
        self._frame_of = arena.frame_of
        cache.attach(arena.address, self._frame_of)

    @property
    def slots(self) -> int:
        """Slots in each layer."""
        return self.cache.pool.shape[1]

    @property
    def nbytes(self) -> int:
        return self.cache.pool.nbytes + self._staging.nbytes

    @property
    def counters(self) -> CacheCounters:
        """Of steps, which the device counts, and of prompts; waits for the device."""
        return self.cache.counters().plus(self._prompts)

    def describe(self) -> str:
        """The policy in force."""
        return f"{self.cache.policy}, decided on the device"

    def hint(self, layer: int, choices: Tensor) -> None:
        """Never wanted."""

    def check_integrity(self) -> None:
        self.cache.check_integrity()

    def close(self) -> None:
        """Once no kernel reads the arena any more."""
        if self.cache.pool.is_cuda:
            torch.cuda.synchronize(self.cache.pool.device)
        self._arena.close()

    def compute(self, layer: int, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """A prompt's: see `RoutedExperts`. Host-driven: waits for the device once, to learn the choices."""
        groups, layout, k = Groups.of(choices), self._layouts[layer], choices.shape[1]
        positions = dict(zip(groups.experts, groups.positions, strict=True))
        products = x.new_empty(choices.numel(), x.shape[1], dtype=torch.float32)
        for expert, record in self._records(layer, groups.experts):
            index = torch.from_numpy(positions[expert]).to(x.device)
            made = expert_mlp(x[index // k], layout.up.view(record), layout.down.view(record))
            products[index] = made.float()
        return combine(products, weights, x.dtype)

    def _records(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Every expert with its record in device memory: the resident ones first, where they lie."""
        slot_of = self.cache.directory.slot_of[layer].tolist()
        resident = [expert for expert in experts if slot_of[expert] != ABSENT]
        others = [expert for expert in experts if slot_of[expert] == ABSENT]
        self._prompts.hits += len(resident)
        self._prompts.misses += len(others)
        self._prompts.bytes_fetched += len(others) * self._layouts.stride
        frames = [self._arena.frames[frame] for frame in self._frame_of[layer, others].tolist()]
        staged = chain.from_iterable(self._staging.waves(frames))
        yield from ((expert, self.cache.pool[layer, slot_of[expert]]) for expert in resident)
        yield from zip(others, staged, strict=True)
