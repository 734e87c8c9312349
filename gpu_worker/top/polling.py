"""Asking a worker and its store how they are, again and again, from a thread of its own.

Either may go away and come back; whoever shows what they say is never kept waiting by one that hangs.
"""

from __future__ import annotations

import threading
import time

from common.addresses import Address
from common.errors import ServingError
from common.grpc_client import channel_to
from common.rpc import expert_store_pb2 as store_pb
from common.rpc.expert_store_pb2_grpc import ExpertStoreStub
from gpu_worker.client import WorkerClient
from gpu_worker.top.history import Answer, History

_STORE_TIMEOUT = 1.0  # seconds
_SAME_START = 1.0  # seconds, by which answers on their way may be late


class Polling:
    """Owns the thread, between `start` and `close`. `latest` is what to show now."""

    def __init__(self, client: WorkerClient, interval: float) -> None:
        self._client, self._interval = client, interval
        self._history: History | None = None
        self._started = 0.0  # of the worker, by this process's clock
        self._problem, self._heard = "", time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="polling", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """A call in progress is left to itself: it ends with the process."""
        self._closing.set()

    def latest(self) -> tuple[History | None, str]:
        """The history, if there ever was an answer, and why it is not of now, if it is not."""
        silent = time.monotonic() - self._heard
        if not self._problem and silent > self._interval + 2:
            return self._history, f"no answer from {self._client.address} for {silent:.0f} s"
        return self._history, self._problem

    def ask(self) -> None:
        """Once; raises ServingError when the worker does not answer."""
        stats = self._client.stats()
        started = time.monotonic() - stats.uptime_seconds
        history = self._history
        if history is None or abs(started - self._started) > _SAME_START:
            history = History(self._client.model_info())  # a worker that began anew may be another
            self._started = started
        history.add(Answer(stats, _ask_store(stats.store_address)))
        self._history = history  # to be shown only now: an empty one cannot be drawn
        self._problem, self._heard = "", time.monotonic()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._poll()
            self._closing.wait(self._interval)

    def _poll(self) -> None:
        try:
            self.ask()
        except ServingError as error:
            self._problem = str(error)


def _ask_store(address: str) -> store_pb.StoreStats | None:
    if not address:
        return None
    try:
        with channel_to(Address.parse(address)) as channel:
            return ExpertStoreStub(channel).Stats(store_pb.StoreStatsRequest(), timeout=_STORE_TIMEOUT)
    except ServingError:
        return None
