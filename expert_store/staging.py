"""Staging: records from disk into frames, in order of urgency.

Demands (a worker waits) come first, then hints, then the preload that fills the free frames in file order.
Reads run in a few threads; everything else happens on the event loop, so the tables need no locks. This file
decides what is read next and when; `frames` decides where to and what has to leave.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from common.checkpoint.packed import PackedCheckpoint
from common.errors import CheckpointError, Exhausted
from common.expert_key import ExpertKey
from expert_store.frames import FrameTable

log = logging.getLogger(__name__)

# Two reads in flight keep a disk busy while one of them returns; large preload reads reach its full speed,
# yet a demand never waits long behind one.
READERS = 2
PRELOAD_BYTES = 32 << 20
_MAX_HINTS = 4096
_MOST_BUFFERS = 512  # of one preadv call; the kernel's limit is 1024

OnStaged = Callable[[Exception | None], None]


class Run(NamedTuple):
    """Experts of one layer that follow each other in the file, and their frames: one read."""

    layer: int
    first: int
    frames: list[int]
    preload: bool = False

    @property
    def last(self) -> ExpertKey:
        return ExpertKey(self.layer, self.first + len(self.frames) - 1)

    @property
    def keys(self) -> list[ExpertKey]:
        return [ExpertKey(self.layer, self.first + i) for i in range(len(self.frames))]


class Stager:
    """Owns the reads in flight. Every demand's callback is called exactly once, on the event loop."""

    def __init__(self, checkpoint: PackedCheckpoint, frames: FrameTable) -> None:
        self.frames = frames
        self.staged_records = 0
        self.staged_bytes = 0
        self.staging_seconds = 0.0
        self.preload_seconds = 0.0  # of these
        self._checkpoint = checkpoint
        self._stride = checkpoint.layout.stride
        self._files = [
            _open(*checkpoint.records_file(layer)) for layer in range(checkpoint.config.num_layers)
        ]
        self._buffer = memoryview(frames.arena.frames.numpy().data).cast("B")
        self._demands: OrderedDict[ExpertKey, list[OnStaged]] = OrderedDict()
        self._hints: deque[ExpertKey] = deque(maxlen=_MAX_HINTS)
        self._preload: Iterator[ExpertKey] = iter(())
        self._reading = 0
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="stage")
        self._preloaded: asyncio.Future[None] | None = None

    def demand(self, key: ExpertKey, on_staged: OnStaged) -> None:
        """Stage `key` as soon as can be; `on_staged(None)` runs in the moment it is READY, before anything
        else can evict it."""
        self._demands.setdefault(key, []).append(on_staged)
        self.advance()

    def withdraw(self, key: ExpertKey, on_staged: OnStaged) -> None:
        """The one who demanded no longer waits; its callback will not be called."""
        waiting = self._demands.get(key, [])
        if on_staged in waiting:
            waiting.remove(on_staged)
        if not waiting:
            self._demands.pop(key, None)

    def hint(self, key: ExpertKey) -> None:
        """Stage `key` when nothing more urgent is to be read; the oldest hints are forgotten first."""
        if self.frames.is_absent(key):
            self._hints.append(key)
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
        """Start the most urgent reads there are readers and frames for. Call whenever a frame came free."""
        while self._reading < READERS:
            run = self._next_run()
            if run is None:
                return
            self._reading += 1
            future = asyncio.get_running_loop().run_in_executor(self._pool, self._read, run)
            future.add_done_callback(partial(self._finish, run))

    def close(self) -> None:
        """Wait for the reads in flight and close the files."""
        self._preload = iter(())
        self._demands.clear()
        self._hints.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file, _ in self._files:
            os.close(file)

    def _next_run(self) -> Run | None:
        for key in self._demands:
            if self.frames.is_absent(key):
                frame = self.frames.reserve(key)
                return Run(*key, [frame]) if frame is not None else None
        while self._hints:
            key = self._hints.popleft()
            if self.frames.is_absent(key) and (frame := self.frames.reserve(key)) is not None:
                return Run(*key, [frame])
        return self._next_preload()

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
        if run is None and self._reading == 0 and self._preloaded and not self._preloaded.done():
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
        if not fill(run.frames, file, offset + run.first * self._stride):
            path, _ = self._checkpoint.records_file(run.layer)
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
        self._reading -= 1
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self.staged_records += len(run.frames)
            self.staged_bytes += len(run.frames) * self._stride
            self.staging_seconds += done.result()
            self.preload_seconds += done.result() if run.preload else 0.0
        else:
            log.error("staging layer %d from expert %d failed: %s", run.layer, run.first, error)
        for key in run.keys:
            self._settle(key, error)
        self.advance()

    def _settle(self, key: ExpertKey, error: BaseException | None) -> None:
        if error is None:
            self.frames.publish(key)
        elif isinstance(error, Exhausted):
            self.frames.retire(key)
        else:
            self.frames.abandon(key)
        for on_staged in self._demands.pop(key, []):
            on_staged(error if isinstance(error, Exception) else None)


def _open(path: os.PathLike[str], offset: int) -> tuple[int, int]:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC), offset
