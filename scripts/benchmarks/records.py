"""Records on their way: disk to frame (staging, loading) and frame to slot (fetching)."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Iterator

import torch
from checkpoint import EXPERTS, packed_checkpoint
from measure import Comparison, compare

from common.arena import ArenaShape, MappedArena, OwnedArena
from common.checkpoint import PackedCheckpoint
from common.expert_key import ExpertKey
from expert_store.frames import FrameTable
from expert_store.staging import PRELOAD_BYTES, Stager
from gpu_worker.slots.fetch import read_ready

KEYS = [ExpertKey(0, expert) for expert in range(EXPERTS)]


def benchmark() -> Iterator[Comparison]:
    """Fetching, staging and loading, with the files in the page cache."""
    with packed_checkpoint() as checkpoint:
        amount = EXPERTS * checkpoint.layout.stride / 1e9
        yield _fetching(checkpoint, amount)
        yield _staging(checkpoint, amount)
        yield _loading(checkpoint, amount)


def _fetching(checkpoint: PackedCheckpoint, amount: float) -> Comparison:
    """The arena read as the worker does it, into slots, against memcpy between the same two places."""
    stride = checkpoint.layout.stride
    arena = _arena(checkpoint)
    try:
        asyncio.run(_preload(checkpoint, arena))
        mapped = MappedArena(arena.path, checkpoint.layout.digest)
        pool = torch.empty(EXPERTS, stride, dtype=torch.uint8)

        wanted = [(key, pool[slot]) for slot, key in enumerate(KEYS)]

        def fetch() -> None:
            assert read_ready(mapped, wanted) == set(KEYS)

        def copy() -> None:
            for (_, slot), frame in zip(wanted, mapped.frames, strict=True):
                ctypes.memmove(slot.data_ptr(), frame.data_ptr(), stride)

        names = ("read_ready, a wave of records", "memmove, record by record")
        return compare("fetching", (names[0], fetch), (names[1], copy), amount, "GB/s", 0.8)
    finally:
        arena.close()


def _staging(checkpoint: PackedCheckpoint, amount: float) -> Comparison:
    """Demands for every record, into frames that have been used before, against memcpy of as many bytes."""
    source = torch.zeros(EXPERTS, checkpoint.layout.stride, dtype=torch.uint8)
    arena = _arena(checkpoint)
    arena.commit(list(range(EXPERTS)))

    def copy() -> None:
        for frame, record in zip(arena.frames, source, strict=True):
            ctypes.memmove(frame.data_ptr(), record.data_ptr(), record.numel())

    try:
        names = ("Stager.demand for each record", "memmove, record by record")
        stage = lambda: asyncio.run(_demand(checkpoint, arena))  # noqa: E731
        return compare("staging", (names[0], stage), (names[1], copy), amount, "GB/s", 0.8)
    finally:
        arena.close()


def _loading(checkpoint: PackedCheckpoint, amount: float) -> Comparison:
    """A new arena, filled and page-locked, against reading the same file into new memory."""
    path, offset = checkpoint.records_file(0)
    size = EXPERTS * checkpoint.layout.stride

    def load() -> None:
        arena = _arena(checkpoint)
        asyncio.run(_preload(checkpoint, arena))
        arena.close()

    def read() -> None:
        buffer = memoryview(bytearray(size))
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < size:
                done += file.readinto(buffer[done : done + PRELOAD_BYTES])

    names = ("Stager.preload into a new arena", "read() into a new buffer")
    return compare("loading", (names[0], load), (names[1], read), amount, "GB/s", 0.8)


def _arena(checkpoint: PackedCheckpoint) -> OwnedArena:
    shape = ArenaShape(checkpoint.layout.digest, 1, EXPERTS, EXPERTS, checkpoint.layout.stride)
    return OwnedArena(shape)


async def _preload(checkpoint: PackedCheckpoint, arena: OwnedArena) -> None:
    stager = Stager(checkpoint, FrameTable(arena))
    await stager.preload()
    stager.close()


async def _demand(checkpoint: PackedCheckpoint, arena: OwnedArena) -> None:
    stager = Stager(checkpoint, FrameTable(arena))
    await asyncio.gather(*(_staged(stager, key) for key in KEYS))
    stager.close()


async def _staged(stager: Stager, key: ExpertKey) -> None:
    done = asyncio.get_running_loop().create_future()
    stager.demand(key, done.set_result)
    assert await done is None
