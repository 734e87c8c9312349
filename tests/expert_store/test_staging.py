"""Staging: what is read first, what is read once, and what becomes of reads that fail."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.arena import ArenaShape, OwnedArena, State
from common.checkpoint import PackedCheckpoint
from common.errors import CheckpointError
from common.expert_key import ExpertKey
from expert_store.frames import FrameTable
from expert_store.staging import READERS, Run, Stager
from tests.helpers.models import make_hf_model, pack_model

LAYERS, EXPERTS = 2, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    directory = tmp_path_factory.mktemp("model")
    return pack_model(make_hf_model(directory / "hf"), directory / "packed")


class Gated(Stager):
    """A stager whose reads wait until the test lets them through; keeps the order they began in."""

    def __init__(self, checkpoint: PackedCheckpoint, frames: FrameTable) -> None:
        super().__init__(checkpoint, frames)
        self.begun: list[ExpertKey] = []
        self.gate = threading.Semaphore(0)
        self.failing: set[ExpertKey] = set()

    def _next_run(self) -> Run | None:
        run = super()._next_run()
        self.begun += run.keys if run else []
        return run

    def _read(self, run: Run) -> float:
        assert self.gate.acquire(timeout=30)
        if self.failing & set(run.keys):
            raise CheckpointError("unreadable")
        return super()._read(run)

    def open_gate(self) -> None:
        self.gate.release(1000)


@pytest.fixture
def arena(checkpoint: PackedCheckpoint) -> Iterator[OwnedArena]:
    arena = make_arena(checkpoint, LAYERS * EXPERTS)
    yield arena
    arena.close()


def make_arena(checkpoint: PackedCheckpoint, frames: int) -> OwnedArena:
    layout = checkpoint.layout
    return OwnedArena(ArenaShape(layout.digest, LAYERS, EXPERTS, frames, layout.stride))


async def demanded(stager: Stager, key: ExpertKey) -> Exception | None:
    done = asyncio.get_running_loop().create_future()
    stager.demand(1, key, done.set_result)
    return await asyncio.wait_for(done, 30)


def test_preload_reads_every_record_into_its_frame(checkpoint: PackedCheckpoint, arena: OwnedArena) -> None:
    async def run() -> None:
        stager = Stager(checkpoint, FrameTable(arena))
        await asyncio.wait_for(stager.preload(), 30)
        stager.frames.check_integrity()
        stager.close()
        assert stager.staged_records == LAYERS * EXPERTS
        assert stager.preload_seconds == stager.staging_seconds > 0

    asyncio.run(run())
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            assert_staged(checkpoint, arena, ExpertKey(layer, expert))


def assert_staged(checkpoint: PackedCheckpoint, arena: OwnedArena, key: ExpertKey) -> None:
    path, offset = checkpoint.records_file(key.layer)
    record = path.read_bytes()[offset + key.expert * checkpoint.layout.stride :][: checkpoint.layout.stride]
    entry = arena.entry(key)
    assert entry.state is State.READY
    assert arena.frames[entry.frame].numpy().tobytes() == record


def test_a_frame_is_filled_again_after_its_record_left(checkpoint: PackedCheckpoint) -> None:
    async def run() -> None:
        stager = Stager(checkpoint, FrameTable(arena))
        for expert in range(EXPERTS):
            assert await demanded(stager, ExpertKey(1, expert)) is None
            assert_staged(checkpoint, arena, ExpertKey(1, expert))
        stager.close()

    arena = make_arena(checkpoint, frames=2)
    try:
        asyncio.run(run())
    finally:
        arena.close()


def test_reads_that_stop_short_go_on(
    checkpoint: PackedCheckpoint, arena: OwnedArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into frames that have memory; the short reads end within a record and at its end."""
    read, step = os.preadv, checkpoint.layout.stride // 2

    def short(file: int, views: list[memoryview], position: int) -> int:
        return read(file, [views[0][:step]], position)

    async def run() -> None:
        stager = Stager(checkpoint, FrameTable(arena))
        await asyncio.wait_for(stager.preload(), 30)
        stager.close()

    arena.commit(list(range(LAYERS * EXPERTS)))
    monkeypatch.setattr(os, "preadv", short)
    asyncio.run(run())
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            assert_staged(checkpoint, arena, ExpertKey(layer, expert))


def test_serving_begins_before_all_is_loaded_and_a_demand_overtakes_the_preload(
    checkpoint: PackedCheckpoint, arena: OwnedArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_store.staging.PRELOAD_BYTES", 1)  # a record a read

    async def run() -> None:
        stager = Gated(checkpoint, FrameTable(arena))
        preloaded = stager.preload()
        last = ExpertKey(LAYERS - 1, EXPERTS - 1)
        demand = asyncio.create_task(demanded(stager, last))
        await asyncio.sleep(0)
        stager.gate.release(2 * READERS)
        assert await demand is None
        assert not preloaded.done()
        assert last in stager.begun[: 2 * READERS]
        stager.open_gate()
        await asyncio.wait_for(preloaded, 30)
        stager.close()

    asyncio.run(run())


def test_one_read_serves_all_who_demand_the_same(checkpoint: PackedCheckpoint, arena: OwnedArena) -> None:
    async def run() -> None:
        stager = Gated(checkpoint, FrameTable(arena))
        waiting = [asyncio.create_task(demanded(stager, ExpertKey(1, 3))) for _ in range(5)]
        await asyncio.sleep(0)
        stager.open_gate()
        assert await asyncio.gather(*waiting) == [None] * 5
        assert stager.begun == [ExpertKey(1, 3)]
        stager.close()

    asyncio.run(run())


def test_a_failed_read_is_told_and_its_frame_is_free_again(
    checkpoint: PackedCheckpoint, arena: OwnedArena
) -> None:
    async def run() -> None:
        stager = Gated(checkpoint, FrameTable(arena))
        key = ExpertKey(0, 0)
        stager.failing = {key}
        stager.open_gate()
        assert isinstance(await demanded(stager, key), CheckpointError)
        stager.frames.check_integrity()
        assert stager.frames.is_absent(key)
        stager.failing = set()
        assert await demanded(stager, key) is None
        stager.close()

    asyncio.run(run())


def test_a_truncated_file_is_an_error_and_no_garbage(
    checkpoint: PackedCheckpoint, arena: OwnedArena, tmp_path: Path
) -> None:
    """The file shrinks after the checkpoint was opened: the read ends early."""

    async def run() -> None:
        stager = Stager(checkpoint, FrameTable(arena))
        _, offset = stager._files[1]
        short = tmp_path / "short"
        path, _ = checkpoint.records_file(1)
        short.write_bytes(path.read_bytes()[: offset + EXPERTS * checkpoint.layout.stride - 1])
        with short.open("rb") as file:
            stager._files[1] = (file.fileno(), offset)
            error = await demanded(stager, ExpertKey(1, EXPERTS - 1))
            assert isinstance(error, CheckpointError)
            assert "ends before" in str(error)
            assert stager.frames.is_absent(ExpertKey(1, EXPERTS - 1))
            stager._files.pop()
        stager.close()

    asyncio.run(run())


def test_a_demand_waits_for_a_frame_and_gets_the_first_that_comes_free(checkpoint: PackedCheckpoint) -> None:
    async def run() -> None:
        frames = FrameTable(arena)
        stager = Stager(checkpoint, frames)
        held = ExpertKey(0, 0)
        assert await demanded(stager, held) is None
        frames.pin(held, lease=2)
        waiting = asyncio.create_task(demanded(stager, ExpertKey(0, 1)))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        frames.unpin(held, lease=2)
        stager.advance()
        assert await waiting is None
        assert frames.is_absent(held)
        stager.close()

    arena = make_arena(checkpoint, frames=1)
    try:
        asyncio.run(run())
    finally:
        arena.close()


def test_a_withdrawn_demand_is_not_called(checkpoint: PackedCheckpoint, arena: OwnedArena) -> None:
    async def run() -> None:
        stager = Gated(checkpoint, FrameTable(arena))
        called: list[object] = []
        stager.demand(1, ExpertKey(0, 0), called.append)
        stager.withdraw(1, ExpertKey(0, 0), called.append)
        stager.open_gate()
        assert await demanded(stager, ExpertKey(0, 1)) is None
        assert called == []
        stager.close()

    asyncio.run(run())


def test_hints_come_after_demands_and_before_the_preload(
    checkpoint: PackedCheckpoint, arena: OwnedArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_store.staging.PRELOAD_BYTES", 1)

    async def run() -> None:
        stager = Gated(checkpoint, FrameTable(arena))
        preloaded = stager.preload()  # takes both readers at once
        stager.hint(1, ExpertKey(1, 5))
        demand = asyncio.create_task(demanded(stager, ExpertKey(1, 6)))
        await asyncio.sleep(0)
        stager.open_gate()
        await demand
        await asyncio.wait_for(preloaded, 30)
        order = [stager.begun.index(key) for key in (ExpertKey(1, 6), ExpertKey(1, 5), ExpertKey(0, READERS))]
        assert order == [READERS, READERS + 1, READERS + 2]
        assert stager.hinted_bytes == checkpoint.layout.stride < stager.staged_bytes
        stager.close()

    asyncio.run(run())


def test_a_hint_for_what_is_ready_keeps_it_from_leaving(checkpoint: PackedCheckpoint) -> None:
    async def run() -> None:
        frames = FrameTable(arena)
        stager = Stager(checkpoint, frames)
        for expert in (0, 1):
            assert await demanded(stager, ExpertKey(0, expert)) is None
        stager.hint(1, ExpertKey(0, 0))
        assert await demanded(stager, ExpertKey(0, 2)) is None
        assert frames.is_ready(ExpertKey(0, 0))
        assert frames.is_absent(ExpertKey(0, 1))
        stager.close()

    arena = make_arena(checkpoint, frames=2)
    try:
        asyncio.run(run())
    finally:
        arena.close()
