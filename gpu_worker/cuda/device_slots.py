"""The slot cache on the device, for stores that keep every expert in RAM: no step of it asks the host.

Owns the directory, the usage, the pool, and the buffers of a step; decisions and copies are the kernels' in
`kernels.slots`, and equal those of `gpu_worker.slots.cache` slot for slot. All buffers are allocated once and
changed in place, so that a captured graph finds them again. Not done here: steps that need more experts than
there are slots and experts without a frame, which are the host's (`snapshot` and `restore` take the cache
there and back), and registering the arena.

Order. resolve, fetch and the expert kernels of a step run in one stream, and so does the next step: a slot is
overwritten only after every kernel that reads its former record, and read only after it was filled. Frames of
such a store are never reused, so a record needs no second look at the arena's directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_worker.cuda.kernels import slots as kernels
from gpu_worker.cuda.kernels.slots import ABSENT, Directory, Misses
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.slots.policies import POLICIES, Usage


class LayerState(NamedTuple):
    """One layer of the directory on the host; lists by slot."""

    clock: int
    experts: list[int]  # -1 when free
    usage: list[Usage]


class DeviceSlots:
    """Owns the slots of all layers.

        FREE --resolve--> RESIDENT, its record to come --fetch--> RESIDENT --(victim of resolve)--+
                                    ^                                                             |
                                    +--------------------- another expert's ----------------------+

    Invariant: an expert's slot holds that expert, and no other slot does. Every `resolve` is followed by the
    same layer's `fetch` before anything reads the pool.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        slots: int,
        stride: int,
        policy: str,
        max_pairs: int,
        device: torch.device,
    ) -> None:
        """max_pairs: rows times experts per row of the largest step, 128 at most."""
        assert policy in POLICIES and max_pairs <= 128 and stride % 4096 == 0
        self.policy = policy

        def ints(*shape: int, value: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.directory = Directory(
            slot_of=ints(layers, experts, value=ABSENT),
            expert_of=ints(layers, slots, value=ABSENT),
            last_used=ints(layers, slots),
            uses=ints(layers, slots),
            clock=ints(layers),
            counters=ints(layers, 2, dtype=torch.int64),
        )
        self.frame_of = ints(layers, experts)
        # A tensor, so that a captured graph reads from the arena that is attached when it is replayed.
        self.arena_base = ints(1, dtype=torch.int64)
        self.slot_ids = ints(max_pairs)
        self.misses = Misses(ints(1), ints(max_pairs), ints(max_pairs))
        # The pool is the weight tensor: kernels are handed slots, never copies.
        self.pool = torch.empty(layers, slots, stride, dtype=torch.uint8, device=device)

    def attach(self, arena_base: int, frame_of: Tensor) -> None:
        """The device's address of frame 0, a multiple of 16, and the frames (layers, experts), all READY."""
        self.arena_base.fill_(arena_base)
        self.frame_of.copy_(frame_of)

    def resolve(self, layer: int, choices: Tensor) -> Tensor:
        """choices (rows, k) int64, contiguous, to slot ids (rows, k) int32, valid until the next call.

        The different experts must fit the slots; the host cannot be told here that they did not.
        """
        arguments = self.policy, self.directory, self.frame_of, self.slot_ids, self.misses
        kernels.resolve(choices, layer, *arguments)
        return self.slot_ids[: choices.numel()].view(choices.shape)

    def fetch(self, layer: int, blocks: int = 16) -> None:
        """Fill the slots that the last `resolve` gave to misses of `layer`, by that many programs.

        More programs than these were not faster on an H100, and they leave the other multiprocessors alone.
        """
        kernels.fetch(layer, self.misses, self.arena_base, self.pool, blocks)

    def counters(self) -> CacheCounters:
        """Hits, misses and bytes since the start; waits for the device."""
        hits, misses = self.directory.counters.sum(0).tolist()
        return CacheCounters(hits, misses, misses * self.pool.shape[2])

    def snapshot(self) -> list[LayerState]:
        """The directory layer by layer, for the host to go on from; waits for the device."""
        columns = (self.directory.expert_of, self.directory.last_used, self.directory.uses)
        rows = zip(self.directory.clock.tolist(), *(column.tolist() for column in columns), strict=True)
        return [
            LayerState(clock, experts, [Usage(*pair) for pair in zip(last_used, uses, strict=True)])
            for clock, experts, last_used, uses in rows
        ]

    def restore(self, states: Sequence[LayerState]) -> None:
        """Go on from what the host left, or was warmed with; the records lie in the pool already."""
        expert_of = torch.tensor([state.experts for state in states], dtype=torch.int32)
        layers, slots = torch.nonzero(expert_of != ABSENT, as_tuple=True)
        slot_of = torch.full(self.directory.slot_of.shape, ABSENT, dtype=torch.int32)
        slot_of[layers, expert_of[layers, slots].long()] = slots.int()
        self.directory.slot_of.copy_(slot_of)
        self.directory.expert_of.copy_(expert_of)
        self.directory.clock.copy_(torch.tensor([state.clock for state in states]))
        for column, field in ((self.directory.last_used, "last_used"), (self.directory.uses, "uses")):
            column.copy_(torch.tensor([[getattr(usage, field) for usage in state.usage] for state in states]))

    def check_integrity(self) -> None:
        """To be called between steps; waits for the device. Conservation: both directions say the same."""
        directory = Directory(*(tensor.cpu() for tensor in self.directory))
        residents = (directory.expert_of != ABSENT).sum(1)
        placed = directory.slot_of != ABSENT
        assert torch.equal(residents, placed.sum(1)), "a slot is lost or held twice"
        layers, experts = torch.nonzero(placed, as_tuple=True)
        slots = directory.slot_of[layers, experts].long()
        assert torch.equal(directory.expert_of[layers, slots].long(), experts), "a slot holds another expert"
        assert (directory.last_used <= directory.clock[:, None]).all(), "a slot was used in the future"
        assert (directory.uses >= 0).all() and (directory.counters >= 0).all()
        assert 0 <= int(self.misses.length) <= len(self.misses.frames), "more misses than pairs"
