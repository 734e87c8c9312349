"""Records on their way in memory: page cache to frame (staging) and frame to slot (fetching)."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Iterator

import torch
from measure import Comparison, compare
from synthetic import marked, synthetic_checkpoint

from common.arena import ArenaShape, MappedArena, OwnedArena
from common.checkpoint import PackedCheckpoint
from common.expert_key import ExpertKey
from expert_store.frames import FrameTable
from expert_store.staging import Stager
from gpu_worker.slots.fetch import read_ready

EXPERTS = 48  # 312 MB of records
KEYS = [ExpertKey(0, expert) for expert in range(EXPERTS)]


def benchmark() -> Iterator[Comparison]:
    """Against memcpy of the same records; the files are in the page cache."""
    with synthetic_checkpoint("E", experts=EXPERTS, vocab=512) as checkpoint:
        yield _fetching(checkpoint)
        yield _staging(checkpoint)


def new_arena(checkpoint: PackedCheckpoint) -> OwnedArena:
    """With a frame for every expert."""
    config, layout = checkpoint.config, checkpoint.layout
    sizes = config.num_layers, config.n_routed_experts, checkpoint.num_experts, layout.stride
    return OwnedArena(ArenaShape(layout.digest, *sizes))


async def preload(checkpoint: PackedCheckpoint, arena: OwnedArena) -> None:
    """Fill the arena as a starting store does."""
    stager = Stager(checkpoint, FrameTable(arena))
    await stager.preload()
    stager.close()


def _fetching(checkpoint: PackedCheckpoint) -> Comparison:
    """The arena read as the worker does it, into slots, against memcpy between the same two places."""
    stride = checkpoint.layout.stride
    arena = new_arena(checkpoint)
    try:
        asyncio.run(preload(checkpoint, arena))
        mapped = MappedArena(arena.path, checkpoint.layout.digest)
        pool = torch.empty(EXPERTS, stride, dtype=torch.uint8)
        wanted = [(key, pool[slot]) for slot, key in enumerate(KEYS)]

        def fetch() -> None:
            assert read_ready(mapped, wanted) == set(KEYS)

        def copy() -> None:
            for (_, slot), frame in zip(wanted, mapped.frames, strict=True):
                ctypes.memmove(slot.data_ptr(), frame.data_ptr(), stride)

        sides = ("read_ready, a wave of records", fetch), ("memmove, record by record", copy)
        return compare(marked("fetching", checkpoint), *sides, checkpoint.routed_bytes / 1e9, "GB/s", 0.8)
    finally:
        arena.close()


def _staging(checkpoint: PackedCheckpoint) -> Comparison:
    """Demands for every record, into frames that have been used before, against memcpy of as many bytes."""
    source = torch.zeros(EXPERTS, checkpoint.layout.stride, dtype=torch.uint8)
    arena = new_arena(checkpoint)
    arena.commit(list(range(EXPERTS)))

    def stage() -> None:
        asyncio.run(_demand(checkpoint, arena))

    def copy() -> None:
        for frame, record in zip(arena.frames, source, strict=True):
            ctypes.memmove(frame.data_ptr(), record.data_ptr(), record.numel())

    try:
        sides = ("Stager.demand for each record", stage), ("memmove, record by record", copy)
        what = marked("staging from the page cache", checkpoint)
        return compare(what, *sides, checkpoint.routed_bytes / 1e9, "GB/s", 0.8)
    finally:
        arena.close()


async def _demand(checkpoint: PackedCheckpoint, arena: OwnedArena) -> None:
    stager = Stager(checkpoint, FrameTable(arena))
    await asyncio.gather(*(_staged(stager, key) for key in KEYS))
    stager.close()


async def _staged(stager: Stager, key: ExpertKey) -> None:
    done = asyncio.get_running_loop().create_future()
    stager.demand(1, key, done.set_result)
    assert await done is None
