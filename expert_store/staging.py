"""Staging: records from disk into frames, in order of urgency.

Demands (a worker waits) come first, then hints, then the preload that fills the free frames in file order.
Among demands and among hints, leases take turns (`turns`). A lease may hold its share of the frames and no
more at a time, in pins and in reads: so however much one asks for, and if it never releases anything, there
are frames for the others. Reads run in a few threads; everything else happens on the event loop, so the
tables need no locks. This file decides what is read next and when; `frames` decides where to and what has to
leave.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from common.checkpoint.packed import PackedCheckpoint
from common.errors import CheckpointError, Exhausted, NotFound
from common.expert_key import ExpertKey
from expert_store.frames import FrameTable
from expert_store.turns import OnStaged, Turns

log = logging.getLogger(__name__)

# Two reads in flight keep a disk busy while one of them returns; large preload reads reach its full speed,
# yet a demand never waits long behind one.
READERS = 2
PRELOAD_BYTES = 32 << 20
_MAX_HINTS = 1024  # of one lease
_MOST_BUFFERS = 512  # of one preadv call; the kernel's limit is 1024


class Run(NamedTuple):
    """Experts of one layer that follow each other in the file, and their frames: one read."""

    layer: int
    first: int
    frames: list[int]
    lease: int | None = None  # whose demand it is; None for hints and the preload
    preload: bool = False

    @property
    def last(self) -> ExpertKey:
        return ExpertKey(self.layer, self.first + len(self.frames) - 1)

    @property
    def keys(self) -> list[ExpertKey]:
        return [ExpertKey(self.layer, self.first + i) for i in range(len(self.frames))]


class Stager:
    """Owns the reads in flight. Every demand's callback is called exactly once, on the event loop."""

    def __init__(self, checkpoint: PackedCheckpoint, frames: FrameTable, leases: Sized = ()) -> None:
        """`leases`: those that share the frames."""
        self.frames = frames
        self.staged_records = 0
        self.staged_bytes = 0
        self.hinted_bytes = 0  # of these: because of hints
        self.staging_seconds = 0.0
        self.preload_seconds = 0.0  # of these
        self._checkpoint = checkpoint
        self._stride = checkpoint.layout.stride
        self._files = [
            _open(*checkpoint.records_file(layer)) for layer in range(checkpoint.config.num_layers)
        ]
        self._buffer = memoryview(frames.arena.frames.numpy().data).cast("B")
        self._leases = leases
        self._demands = Turns()
        self._hints = Turns(_MAX_HINTS)
        self._preload: Iterator[ExpertKey] = iter(())
        self._reading: list[Run] = []
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="stage")
        self._preloaded: asyncio.Future[None] | None = None

    @property
    def share(self) -> int:
        """Frames that one lease may hold at a time."""
        return max(1, self.frames.usable // max(1, len(self._leases)))

    def is_full(self) -> bool:
        """Whether all readers are at work: what waits now waits for the disk."""
        return len(self._reading) == READERS

    def demand(self, lease: int, key: ExpertKey, on_staged: OnStaged) -> None:
        """Stage `key` as soon as can be; `on_staged(None)` runs in a moment when it is READY and the lease
        has room to pin it, before anything else can evict it. That may be at once."""
        self._demands.add(lease, key, on_staged)
        if self.frames.is_ready(key):
            self._grant(lease)
        self.advance()

    def withdraw(self, lease: int, key: ExpertKey, on_staged: OnStaged) -> None:
        """The one who demanded no longer waits; its callback will not be called."""
        self._demands.withdraw(lease, key, on_staged)

    def drop(self, lease: int) -> None:
        """The lease has ended: what it asked for is not read any more."""
        self._hints.take_all(lease)
        for on_staged in self._demands.take_all(lease):
            on_staged(NotFound(f"lease {lease:x} has ended; attach again"))
        self.advance()

    def hint(self, lease: int, key: ExpertKey) -> None:
        """Stage `key` when nothing more urgent is to be read; the oldest hints are forgotten first."""
        if self.frames.is_absent(key):
            self._hints.add(lease, key)
            self.advance()
        else:
            self.frames.touch(key)

    def preload(self) -> asyncio.Future[None]:
        """Fill the free frames in file order; the future ends when no frame is free or all are staged."""
        config = self._checkpoint.config
        self._preload = (
            ExpertKey(layer, expert)
            for layer in range(config.num_layers)
            for expert in range(config.n_routed_experts)
        )
        self._preloaded = asyncio.get_running_loop().create_future()
        self.advance()
        return self._preloaded

    def advance(self) -> None:
        """Start the most urgent reads there are readers and frames for."""
        while len(self._reading) < READERS:
            run = self._next_run()
            if run is None:
                return
            self._reading.append(run)
            future = asyncio.get_running_loop().run_in_executor(self._pool, self._read, run)
            future.add_done_callback(partial(self._finish, run))

    def released(self, *leases: int) -> None:
        """To be called when pins have ended: whoever waited for room goes on."""
        for lease in leases or self._demands:
            self._grant(lease)
        self.advance()

    def close(self) -> None:
        """Wait for the reads in flight and close the files."""
        self._preload = iter(())
        self._demands.clear()
        self._hints.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file, _ in self._files:
            os.close(file)

    def _grant(self, lease: int) -> None:
        """Hand over what the lease waits for and is READY, as far as it has room."""
        for key in self._demands.keys(lease):
            if self.frames.is_ready(key) and self._has_room(lease, key):
                for on_staged in self._demands.take(lease, key):
                    on_staged(None)

    def _has_room(self, lease: int, key: ExpertKey) -> bool:
        """A lease that pins `key` already takes no more by doing so again."""
        held = self.frames.pinned_by(lease) + sum(run.lease == lease for run in self._reading)
        return held < self.share or self.frames.pins(key, lease)

    def _next_run(self) -> Run | None:
        if self._demands and not self.frames.usable:
            self.frames.reinstate()  # no frame has got memory so far; if there is still none, they are told
        for lease in self._demands:
            absent = next(filter(self.frames.is_absent, self._demands.keys(lease)), None)
            if absent is not None and self._has_room(lease, absent):
                frame = self.frames.reserve(absent)
                if frame is None:
                    return None
                self._demands.end_turn(lease)
                return Run(*absent, [frame], lease)
        return self._next_hint() or self._next_preload()

    def _next_hint(self) -> Run | None:
        for lease in self._hints:
            for key in self._hints.keys(lease):
                self._hints.take(lease, key)
                if self.frames.is_absent(key) and (frame := self.frames.reserve(key)) is not None:
                    self._hints.end_turn(lease)
                    return Run(*key, [frame])
        return None

    def _next_preload(self) -> Run | None:
        """The next neighbours in file order, as many as one large read takes."""
        limit = max(1, min(PRELOAD_BYTES // self._stride, _MOST_BUFFERS))
        run: Run | None = None
        for key in self._preload:
            if self.frames.is_absent(key):
                frame = self.frames.reserve(key, evict=False)
                if frame is None:
                    self._preload = iter(())
                    break
                run = run or Run(key.layer, key.expert, [], preload=True)
                run.frames.append(frame)
            # A gap (an expert staged by demand) or the layer's end also ends the run.
            if run and (len(run.frames) == limit or key != run.last or self._ends_layer(key)):
                break
        if run is None and not self._reading and self._preloaded and not self._preloaded.done():
            self._preloaded.set_result(None)
        return run

    def _ends_layer(self, key: ExpertKey) -> bool:
        return key.expert == self._checkpoint.config.n_routed_experts - 1

    def _read(self, run: Run) -> float:
        """In a reader thread: fill the run's frames; returns the seconds that took."""
        started = time.monotonic()
        arena = self.frames.arena
        file, offset = self._files[run.layer]
        fill = self._scatter if arena.has_memory(run.frames) else arena.receive
        path, _ = self._checkpoint.records_file(run.layer)
        try:
            whole = fill(run.frames, file, offset + run.first * self._stride)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if not whole:
            raise CheckpointError(f"{path} ends before expert {run.first} of layer {run.layer} does")
        return time.monotonic() - started

    def _scatter(self, frames: list[int], file: int, position: int) -> bool:
        """One positioned read scattered over frames that have memory; False if the file ends early."""
        views = [self._buffer[frame * self._stride : (frame + 1) * self._stride] for frame in frames]
        while views:
            count = os.preadv(file, views, position)
            if count == 0:
                return False
            position += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if views:
                views[0] = views[0][count:]
        return True

    def _finish(self, run: Run, done: asyncio.Future[float]) -> None:
        self._reading.remove(run)
        if done.cancelled():
            return
        error = done.exception()
        assert error is None or isinstance(error, Exception)
        if error is None:
            self.staged_records += len(run.frames)
            self.staged_bytes += len(run.frames) * self._stride
            self.hinted_bytes += self._stride if run.lease is None and not run.preload else 0
            self.staging_seconds += done.result()
            self.preload_seconds += done.result() if run.preload else 0.0
        else:
            log.error("staging layer %d from expert %d failed: %s", run.layer, run.first, error)
        for key in run.keys:
            self._settle(key, error)
        self.advance()

    def _settle(self, key: ExpertKey, error: Exception | None) -> None:
        if error is None:
            self.frames.publish(key)
        elif isinstance(error, Exhausted):
            self.frames.retire(key)
            if self.frames.usable:
                return  # whoever demands it waits for a frame that has memory
        else:
            self.frames.abandon(key)
        for lease in self._demands:
            if error is None:
                self._grant(lease)
            else:
                for on_staged in self._demands.take(lease, key):
                    on_staged(error)


def _open(path: os.PathLike[str], offset: int) -> tuple[int, int]:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC), offset
