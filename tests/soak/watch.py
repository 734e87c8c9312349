"""What the processes say of themselves while clients are at them, and what is left afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from common.addresses import Address
from common.errors import ServingError
from common.grpc_client import open_async_channel
from common.rpc import expert_store_pb2 as store_pb
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.expert_store_pb2_grpc import ExpertStoreStub
from gpu_worker.client import AsyncWorkerClient
from tests.soak.front import Front

_EVERY = 0.5  # seconds
_REST = 20.0  # seconds in which everything must have come back


@dataclass
class Watch:
    """Owns what was seen: resident bytes by process over time, the most of each count, and faults."""

    worker: AsyncWorkerClient
    store: Address
    front: Front | None
    times: list[float] = field(default_factory=list)
    resident: dict[str, list[int]] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_EVERY)

    async def look(self) -> tuple[pb.WorkerStats, store_pb.StoreStats]:
        worker, store = await self.worker.stats(), await self._store_stats()
        self.times.append(time.monotonic())
        self._note("worker", worker.resident_bytes)
        self._note("store", store.resident_bytes)
        if self.front is not None:
            self._note("gateway", await self.front.resident_bytes())
        for name, count in _counts(worker, store).items():
            self.most[name] = max(self.most.get(name, 0), count)
        if worker.places_taken > worker.places or worker.prefix_bytes > worker.prefix_budget:
            self.faults.append(f"more than there is: {worker}")
        return worker, store

    async def check_rest(self, before: dict[str, int]) -> None:
        """Wait until all counts are what they were before anybody asked."""
        until = time.monotonic() + _REST
        while (now := await self.counts()) != before and time.monotonic() < until:
            await asyncio.sleep(0.1)
        self.faults += [
            f"{name}: {now[name]}, {before[name]} before" for name in now if now[name] != before[name]
        ]

    async def counts(self) -> dict[str, int]:
        return _counts(*await self.look())

    def growth(self, name: str, warm: float) -> float:
        """Bytes a second by the line of least squares through what was seen after `warm` of the time."""
        sizes = self.resident[name]
        first = int(len(sizes) * warm)
        return _slope(self.times[-len(sizes) :][first:], sizes[first:])

    def _note(self, name: str, size: int) -> None:
        self.resident.setdefault(name, []).append(size)

    async def _store_stats(self) -> store_pb.StoreStats:
        async with open_async_channel(self.store) as channel:
            try:
                return await ExpertStoreStub(channel).Stats(store_pb.StoreStatsRequest(), timeout=30)
            except grpc.RpcError as error:
                raise ServingError(f"the store's figures: {error}") from error


def _counts(worker: pb.WorkerStats, store: store_pb.StoreStats) -> dict[str, int]:
    """What must come back to what it was."""
    return {
        "running": worker.running,
        "set aside": worker.set_aside,
        "bytes of prompts set aside": worker.prompt_state_bytes,
        "waiting": worker.waiting,
        "places taken": worker.places_taken,
        "slots pinned": worker.slots_pinned,
        "requests that failed": worker.requests_failed,
        "requests that nobody read": worker.requests_unread,
        "leases": len(store.leases),
        "frames pinned": store.pinned_frames,
    }


def _slope(x: Sequence[float], y: Sequence[int]) -> float:
    if len(x) < 2:
        return 0.0
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
