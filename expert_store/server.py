"""The store process: its life from claiming the address to removing the segment, in one place.

claim address -> open checkpoint -> create arena -> bind data plane -> serve -> preload -> stop:
refuse new calls -> close sockets -> finish reads -> remove segment -> release address.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import ExitStack
from pathlib import Path

from prometheus_client.core import Metric
from rich.console import Console

from common.arena import ArenaShape, OwnedArena, reclaim_dead_segments
from common.checkpoint.packed import PackedCheckpoint
from common.grpc_server import RpcServer
from common.metrics import MetricsPage, new_registry, read_on_loop
from common.process import EXIT_INVARIANT, watch
from common.rpc import expert_store_pb2 as pb
from common.rpc.expert_store_pb2_grpc import add_ExpertStoreServicer_to_server
from common.units import format_bytes
from expert_store.config import StoreConfig
from expert_store.control import ControlService
from expert_store.frames import PIN_LIMIT, FrameTable
from expert_store.leases import LeaseTable
from expert_store.metrics import figures_of
from expert_store.miss_loop import MissLoop
from expert_store.progress_bar import progress_bar
from expert_store.sizing import choose_frames
from expert_store.staging import Stager

log = logging.getLogger(__name__)
_STOP_GRACE = 1.0


class Store:
    """Owns everything of one running store."""

    def __init__(
        self, config: StoreConfig, checkpoint: PackedCheckpoint, data_path: Path, console: Console
    ) -> None:
        """To be made on the running loop; `data_path` is where the data plane's socket goes."""
        model, stride = checkpoint.config, checkpoint.layout.stride
        self.config, self.checkpoint = config, checkpoint
        self.started = time.monotonic()
        self.exit_status = 0
        self._stopping = asyncio.Event()
        self._console = console
        self._control = ControlService(self)
        experts = model.num_layers * model.n_routed_experts
        reclaim_dead_segments()  # before free memory is looked at
        budget = choose_frames(config.ram, stride, experts)
        log.info("arena: %d frames of %s; %s", budget.frames, format_bytes(stride), budget.reason)
        self.all_fit = budget.frames == experts
        digest = checkpoint.layout.digest
        shape = ArenaShape(digest, model.num_layers, model.n_routed_experts, budget.frames, stride)
        with ExitStack() as resources:
            self.arena = OwnedArena(shape)
            resources.callback(self.arena.close)
            self.frames = FrameTable(self.arena)
            self.leases = LeaseTable(config.lease_ttl, ended=self._lease_ended)
            self.stager = Stager(checkpoint, self.frames, self.leases)
            resources.callback(self.stager.close)
            self.misses = MissLoop(data_path, self.frames, self.leases, self.stager)
            resources.callback(self.misses.close)
            self.rpc = RpcServer(config.listen, on_fatal=self.fail)
            self._resources = resources.pop_all()  # the last acquired is the first to be closed

    def stop(self) -> None:
        """Ask the process to end in good order."""
        self._stopping.set()

    def reload(self) -> None:
        """It has nothing that may change while it runs."""

    async def run(self) -> int:
        """Serve until stopped; returns the exit status."""
        add_ExpertStoreServicer_to_server(self._control, self.rpc.server)
        tasks: list[asyncio.Task[None]] = []
        try:
            await self.rpc.start(pb.DESCRIPTOR.services_by_name["ExpertStore"].full_name)
            self.misses.start()
            if self.config.metrics is not None:
                page = MetricsPage(self.config.metrics, new_registry(read_on_loop(self._figures)))
                self._resources.callback(page.close)
            await self.rpc.set_serving(True)
            log.info("ready on %s", self.config.listen)
            background = (self._preload(), self._expire_leases())
            tasks = [watch(asyncio.create_task(task), self.fail) for task in background]
            await self._stopping.wait()
            log.info("stopping")
        finally:
            for task in tasks:
                task.cancel()
            with self._resources:
                await self.rpc.stop(_STOP_GRACE)
        return self.exit_status

    def fail(self, error: BaseException) -> None:
        """An invariant broke: end, and say so by the exit status."""
        self.exit_status = EXIT_INVARIANT
        self.stop()

    async def _figures(self) -> list[Metric]:
        return list(figures_of(self._control.stats()))

    def _lease_ended(self, lease_id: int) -> None:
        self.frames.unpin_all(lease_id)
        self.stager.drop(lease_id)
        self.stager.released()  # and everybody's share has grown

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(self.leases.ttl / 4)
            for lease in self.leases.expire():
                log.warning("worker %s (pid %d) is gone; its lease has ended", lease.worker, lease.pid)
            if ended := self.frames.end_old_pins():
                log.warning("%d pins have ended: nobody released them for %g s", ended, PIN_LIMIT)
                self.stager.released()

    async def _preload(self) -> None:
        """Fill the arena."""
        done = self.stager.preload()
        total = self.arena.shape.frames * self.arena.shape.stride
        with progress_bar(self._console, "loading experts") as progress:
            while not done.done():
                await asyncio.wait([done], timeout=0.1)
                progress(min(total, self.stager.staged_bytes), total)
        seconds = time.monotonic() - self.started
        staged = format_bytes(self.stager.staged_bytes)
        log.info("%d experts ready, %s in %.1f s", self.frames.ready_count, staged, seconds)
        if not self.arena.page_locked:
            log.warning("the arena is not page-locked (RLIMIT_MEMLOCK); raise it with `ulimit -l unlimited`")
