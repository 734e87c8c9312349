"""The control plane of the store: the gRPC service that workers attach to and people ask for stats.

Translation only: each method reads the tables of the store and fills a message. Errors become statuses in
one place, `common.grpc_server`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import grpc

from common.errors import Incompatible
from common.messages import PROTOCOL_VERSION
from common.process import resident_bytes
from common.rpc import expert_store_pb2 as pb
from common.rpc.expert_store_pb2_grpc import ExpertStoreServicer

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    from expert_store.server import Store

log = logging.getLogger(__name__)


class ControlService(ExpertStoreServicer):
    """Answers for one running store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def Attach(self, request: pb.AttachRequest, context: Context) -> pb.AttachReply:
        if request.protocol_version != PROTOCOL_VERSION:
            raise Incompatible(
                f"the store speaks protocol {PROTOCOL_VERSION}, the worker {request.protocol_version}; "
                "run both from one installation"
            )
        store = self.store
        lease = store.leases.attach(request.worker, request.pid)
        log.info("worker %s (pid %d) attached, lease %x", request.worker, request.pid, lease.lease_id)
        return pb.AttachReply(
            protocol_version=PROTOCOL_VERSION,
            lease_id=lease.lease_id,
            lease_ttl_ms=round(store.leases.ttl * 1000),
            arena_path=str(store.arena.path),
            data_endpoint=store.misses.endpoint,
            checkpoint=str(store.checkpoint.directory),
            layout_digest=store.arena.shape.layout_digest,
            fingerprint=store.checkpoint.fingerprint,
            all_fit=store.all_fit,
        )

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatReply:
        self.store.leases.renew(request.lease_id)
        return pb.HeartbeatReply()

    async def Detach(self, request: pb.DetachRequest, context: Context) -> pb.DetachReply:
        self.store.leases.detach(request.lease_id)
        log.info("lease %x given back", request.lease_id)
        return pb.DetachReply()

    async def Stop(self, request: pb.StopStoreRequest, context: Context) -> pb.StopStoreReply:
        # After the reply is on its way.
        asyncio.get_running_loop().call_later(0.05, self.store.stop)
        return pb.StopStoreReply()

    async def Stats(self, request: pb.StoreStatsRequest, context: Context) -> pb.StoreStats:
        return self.stats()

    def stats(self) -> pb.StoreStats:
        """To be called on the event loop."""
        store = self.store
        frames, stager, counters = store.frames, store.stager, store.misses.counters
        shape = store.arena.shape
        return pb.StoreStats(
            model=store.config.model + (" (synthetic)" if store.checkpoint.synthetic else ""),
            checkpoint=str(store.checkpoint.directory),
            fingerprint=store.checkpoint.fingerprint,
            layers=shape.layers,
            experts_per_layer=shape.experts,
            record_bytes=shape.stride,
            frames=shape.frames,
            ready_frames=frames.ready_count,
            pinned_frames=frames.pinned_count,
            arena_bytes=shape.size,
            page_locked=store.arena.page_locked,
            staged_records=stager.staged_records,
            staged_bytes=stager.staged_bytes,
            staging_seconds=stager.staging_seconds,
            preload_seconds=stager.preload_seconds,
            demands=counters.demands,
            demands_ready=counters.demands_ready,
            hints=counters.hints,
            evictions=frames.evictions,
            hinted_bytes=stager.hinted_bytes,
            refused=counters.refused,
            resident_bytes=resident_bytes(),
            uptime_seconds=time.monotonic() - store.started,
            leases=[
                pb.LeaseInfo(
                    lease_id=lease.lease_id,
                    worker=lease.worker,
                    pid=lease.pid,
                    pinned_frames=frames.pinned_by(lease.lease_id),
                )
                for lease in store.leases
            ],
        )
