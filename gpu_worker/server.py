"""The worker process: its life from attaching to detaching, in one place.

listen -> attach to the store -> load the model -> serve -> drain: accept nothing more and let what was
accepted finish, as far as the time for it suffices -> stop: end the engine's thread and every request with
it, close the server, give the lease back.
(The address is claimed before and released after, by the command line.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial

import torch

from common.grpc_server import RpcServer
from common.hlwq import native
from common.metrics import MetricsPage
from common.process import EXIT_INVARIANT, watch
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.gpu_worker_pb2_grpc import add_GpuWorkerServicer_to_server
from gpu_worker.config import WorkerConfig
from gpu_worker.device_errors import device_failure
from gpu_worker.lifecycle import SERVING, Lifecycle
from gpu_worker.loading import ServedModel, load_model
from gpu_worker.scheduler import Scheduler
from gpu_worker.service import GenerationService
from gpu_worker.sizing import resolve_device
from gpu_worker.store_link import Attachment, StoreLink

log = logging.getLogger(__name__)

ATTACH_TIMEOUT = 120.0  # seconds; a store that packs its model first takes its time
_STOP_GRACE = 1.0
_HEALTH_PERIOD = 0.5
_NOT_READY = "not ready: the store is lost, and not all experts are in the memory that it left"
_STEP_TIMEOUT = 30.0  # seconds that the step in progress may take to end


class Worker:
    """Owns everything of one running worker."""

    def __init__(self, config: WorkerConfig, name: str) -> None:
        self.config = config
        self.started = time.monotonic()
        self.link = StoreLink(config.store, name)
        self.life = Lifecycle()
        self._keys = config.keys()
        self._rpc = RpcServer(config.listen, self.fail, config.tls(), self._keys)
        self._service = GenerationService(self, self.life)
        self._exit_status = 0
        self._device_failed = False
        self._stopping = asyncio.Event()
        self._failed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._scheduler: Scheduler | None = None
        self._model: ServedModel | None = None
        self._page: MetricsPage | None = None

    @property
    def ready(self) -> bool:
        """What health says: requests are accepted, and every expert can be had. Without its store, a worker
        decodes on if all experts are in the arena that it has mapped."""
        attachment = self.link.last_attachment
        return self.life.state == SERVING and (
            self.link.attachment is not None or (attachment is not None and not attachment.arena.missing())
        )

    def stop(self) -> None:
        """Ask the process to end in good order."""
        self._stopping.set()

    def reload(self) -> None:
        """Take up a changed file of API keys."""
        if self._keys is not None:
            self._keys.reload()
            log.info("%d API keys", len(self._keys))

    async def run(self) -> int:
        """Attach, load, serve until stopped; returns the exit status."""
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()  # raises what kept the worker from starting
                await stopping
                await self._drain()
            log.info("stopping")
        finally:
            starting.cancel()
            stopping.cancel()
            await self._close()
        return self._exit_status

    async def _start(self) -> None:
        add_GpuWorkerServicer_to_server(self._service, self._rpc.server)
        await self._rpc.start(pb.DESCRIPTOR.services_by_name["GpuWorker"].full_name)
        if self.config.metrics is not None:
            self._page = MetricsPage(self.config.metrics, self._service.metrics.registry)
        resolve_device(self.config)  # what cannot be should not first wait for a store
        attachment = await self.link.attach(ATTACH_TIMEOUT)
        self.life.doing = "it loads its model"
        self._tasks.append(watch(asyncio.create_task(self.link.keep()), self.fail))
        # In a thread, so that heartbeats go on.
        self._model = await asyncio.to_thread(self._load, attachment)
        if self._model.device.type == "cpu":
            _share_cores()
        loop = asyncio.get_running_loop()
        self._scheduler = Scheduler(
            self._model.engine,
            self.config.max_queue,
            on_fatal=lambda error: loop.call_soon_threadsafe(partial(self.fail, error)),
            budget=self._model.account.budget,
        )
        self._scheduler.start()
        self._service.begin(self._model, self._scheduler)
        self.life.serve()
        await self._rpc.set_serving(self.ready)
        self._tasks.append(watch(asyncio.create_task(self._keep_health()), self.fail))
        log.info("ready on %s after %.1f s", self.config.listen, time.monotonic() - self.started)

    async def _keep_health(self) -> None:
        """Say whenever readiness changes, until draining."""
        said = self.ready
        while self.life.state == SERVING:
            if self.ready != said:
                said = not said
                await self._rpc.set_serving(said)
                log.log(logging.INFO if said else logging.WARNING, "ready again" if said else _NOT_READY)
            await asyncio.sleep(_HEALTH_PERIOD)

    async def _drain(self) -> None:
        """Until every request that was accepted has ended, the time for that is over, or the worker fails."""
        self.life.drain()
        await self._rpc.set_serving(False)
        if self._failed.is_set():
            return
        timeout = self.config.drain_timeout
        if self.life.calls:
            log.info("draining: %d requests have %g s to finish", self.life.calls, timeout)
        waits = [asyncio.create_task(self.life.idle()), asyncio.create_task(self._failed.wait())]
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.life.calls:
            log.warning("%d requests did not finish within %g s", self.life.calls, timeout)

    def _load(self, attachment: Attachment) -> ServedModel:
        try:
            return load_model(self.config, attachment, self.link)
        except RuntimeError as error:
            budget = self.config.vram if isinstance(self.config.vram, int) else None
            if (failure := device_failure(error, budget)) is not None:
                raise failure from error
            raise

    async def _close(self) -> None:
        """Running and waiting requests first, so that each still gets its ending; then the server."""
        try:
            self.link.interrupt()
            if self._scheduler is not None and self._model is not None:
                if await asyncio.to_thread(self._scheduler.stop, _STEP_TIMEOUT):
                    self._model.fetcher.close()
                    self._close_model(self._model)
                else:
                    log.error("the step in progress did not end within %g s", _STEP_TIMEOUT)
                    self._exit_status = EXIT_INVARIANT
            await self._rpc.stop(_STOP_GRACE)
        finally:
            for task in self._tasks:
                task.cancel()
            if self._page is not None:
                await asyncio.to_thread(self._page.close)
            await self.link.close()

    def _close_model(self, model: ServedModel) -> None:
        # A device that has failed would fail again; what is left there ends with the process.
        if not self._device_failed:
            if model.memory is not None:
                log.info("%s", model.memory.use().describe(model.account.budget))
            model.engine.close()

    def fail(self, error: BaseException) -> None:
        """An invariant broke or the device failed: end, and say so by the exit status."""
        self._exit_status = EXIT_INVARIANT
        self._device_failed |= device_failure(error, None) is not None
        self._failed.set()
        self.stop()


def _share_cores() -> None:
    """Give the cores to the native kernels. What PyTorch has left to do is small, and its threads would spin
    on the cores between two such things."""
    if native.path() != native.PLAIN:
        native.set_threads(torch.get_num_threads())
        torch.set_num_threads(1)
