"""A whole worker in a thread of this process, over an arena in this process: all of it but its store."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from common.addresses import Address
from common.grpc_client import wait_until_serving
from gpu_worker import server
from gpu_worker.client import WorkerClient
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.lifecycle import handed_back
from gpu_worker.server import Worker
from gpu_worker.store_link import Attachment
from tests.helpers.engines import NOWHERE, FixedLink

WAIT = 30.0  # seconds; far more than anything here takes


class QuietLink(FixedLink):
    """What a worker sees of a store that is there, or is not when a test says so."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(attachment)
        self.may_attach = threading.Event()
        self.may_attach.set()
        self.interrupted = False

    async def attach(self, timeout: float) -> Attachment:
        while not self.may_attach.is_set():
            await asyncio.sleep(0.01)
        return self.attachment

    async def keep(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Nobody to detach from."""

    def interrupt(self) -> None:
        self.interrupted = True

    def check_interrupted(self) -> None:
        if self.interrupted:
            raise handed_back()


class LocalWorker:
    """`pause` is a lock that every step of decoding takes: a test that holds it holds the engine."""

    def __init__(self, address: Address, link: QuietLink) -> None:
        self.address, self.link = address, link
        self.status: int | None = None
        self.pause = threading.Lock()
        self.steps = 0  # of decode
        self.step_seconds = 0.0
        self.worker: Worker | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self, **options: Any) -> None:
        self._options = options
        self._thread.start()

    def client(self) -> WorkerClient:
        return WorkerClient(self.address, retry_for=0)

    def call(self, action: Callable[[], object]) -> None:
        """On the worker's event loop."""
        self._loop.call_soon_threadsafe(action)

    def stop(self) -> None:
        assert self.worker is not None
        self.call(self.worker.stop)

    def join(self) -> int | None:
        """The exit status, once the worker has ended."""
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), "the worker did not end"
        return self.status

    def eventually_idle(self) -> None:
        """Waits until nothing runs, nothing waits, and no call is open."""
        assert self.worker is not None
        assert self.worker._scheduler is not None
        deadline = time.monotonic() + WAIT
        while self.worker.life.calls or self.worker._scheduler.jobs:
            assert time.monotonic() < deadline, "requests are left"
            time.sleep(0.002)

    def _run(self) -> None:
        async def run() -> None:
            self._loop = asyncio.get_running_loop()
            config = WorkerConfig(store=NOWHERE, listen=self.address, device="cpu", **self._options)
            self.worker = Worker(config, name="test")
            self.status = await self.worker.run()

        asyncio.run(run())


@contextmanager
def local_worker(link: QuietLink, directory: Path, **options: Any) -> Iterator[LocalWorker]:
    """Ready, unless the link may not attach; stopped at the end of the block."""
    local = LocalWorker(Address.parse(f"unix:{directory}/worker.sock"), link)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "StoreLink", lambda *_: link)
        patch.setattr(link, "interrupted", False)
        decode = Engine.decode

        def paused(engine: Engine, places: Sequence[int], tokens: Sequence[int]) -> Tensor:
            with local.pause:
                local.steps += 1
                time.sleep(local.step_seconds)
            return decode(engine, places, tokens)

        patch.setattr(Engine, "decode", paused)
        local.start(**options)
        try:
            if link.may_attach.is_set():
                wait_until_serving(local.address, WAIT)
            yield local
        finally:
            link.may_attach.set()
            if local._thread.is_alive():
                local.stop()
            local.join()
