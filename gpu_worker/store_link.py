"""The link to the store: attach, heartbeats, loss, and coming back, on the event loop.

    LOST --attach--> ATTACHED --(heartbeat fails, or the lease is gone)--> LOST --attach--> ...

The engine's thread reads `attachment` (None while lost) and `last_attachment`, whose mapped arena stays
readable whatever becomes of the store. Only this file assigns them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from common.addresses import Address
from common.arena import MappedArena
from common.errors import Incompatible, NotFound, ServingError, Unavailable
from common.grpc_client import OPTIONS, translate
from common.messages import PROTOCOL_VERSION
from common.ownership import check_own_endpoint
from common.rpc import expert_store_pb2 as pb
from common.rpc.expert_store_pb2_grpc import ExpertStoreStub
from gpu_worker.lifecycle import handed_back

log = logging.getLogger(__name__)

_CALL_TIMEOUT = 2.0
_RETRY_PAUSE = 0.2
_HEARTBEATS_PER_TTL = 3


@dataclass(frozen=True, eq=False)
class Attachment:
    """One attachment: compared by identity, since a store's successor makes a new one."""

    lease_id: int
    lease_ttl: float
    arena: MappedArena
    data_endpoint: str
    checkpoint: Path
    fingerprint: str
    all_fit: bool


class StoreLink:
    """Owns the control channel and the current attachment."""

    def __init__(self, address: Address, worker: str) -> None:
        self.address = address
        self.attachment: Attachment | None = None
        self.last_attachment: Attachment | None = None
        self.interrupted = False
        self._worker = worker
        self._changed = threading.Condition()
        self._given_up: asyncio.Queue[Attachment] = asyncio.Queue()
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def attach(self, timeout: float) -> Attachment:
        """The first attachment; waits up to `timeout` seconds for the store to answer."""
        self._loop = asyncio.get_running_loop()
        deadline = self._loop.time() + timeout
        announced = ""
        while True:
            try:
                return await self._attach()
            except Unavailable as error:
                if self._loop.time() > deadline:
                    raise
                if str(error) != announced:
                    log.info("waiting for the store: %s", error)
                announced = str(error)
            await asyncio.sleep(_RETRY_PAUSE)

    async def keep(self) -> None:
        """Heartbeats while attached, attempts to attach while lost; runs until cancelled."""
        while True:
            attachment = self.attachment
            if attachment is None:
                await self._return()
                continue
            try:
                pause = attachment.lease_ttl / _HEARTBEATS_PER_TTL
                given_up = await asyncio.wait_for(self._given_up.get(), pause)
                await self._give_back(given_up.lease_id)
            except asyncio.TimeoutError:
                await self._heartbeat(attachment)

    async def close(self) -> None:
        """Give the lease back, if there is anyone to give it to."""
        attachment, self.attachment = self.attachment, None
        if self._channel is None:
            return
        if attachment is not None:
            await self._give_back(attachment.lease_id)
        await self._channel.close(grace=None)

    def interrupt(self) -> None:
        """The worker is stopping: whoever waits for the store waits no more."""
        with self._changed:
            self.interrupted = True
            self._changed.notify_all()

    def check_interrupted(self) -> None:
        """Raises Unavailable once the worker is stopping."""
        if self.interrupted:
            raise handed_back()

    def wait_attached(self, timeout: float) -> Attachment:
        """In the engine's thread: the attachment, waiting for a lost store to return; else Unavailable."""
        with self._changed:
            returned = self._changed.wait_for(
                lambda: self.attachment is not None or self.interrupted, timeout
            )
            self.check_interrupted()
            if not returned:
                raise Unavailable(
                    f"the expert store on {self.address} is gone and did not return within {timeout:g} s"
                )
            assert self.attachment is not None
            return self.attachment

    def give_up(self, attachment: Attachment) -> None:
        """In the engine's thread: end this attachment, and with it whatever it has pinned; attach anew."""
        with self._changed:
            if self.attachment is not attachment:
                return
            self.attachment = None
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._given_up.put_nowait, attachment)

    async def _attach(self) -> Attachment:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(str(self.address), options=OPTIONS)
        request = pb.AttachRequest(protocol_version=PROTOCOL_VERSION, worker=self._worker, pid=os.getpid())
        try:
            reply = await self._stub().Attach(request, timeout=_CALL_TIMEOUT)
        except grpc.RpcError as error:
            raise translate(error, self.address) from None
        try:
            attachment = self._attachment_of(reply)
        except ServingError:
            await self._give_back(reply.lease_id)  # it would count until it expires
            raise
        with self._changed:
            self.attachment = self.last_attachment = attachment
            self._changed.notify_all()
        return attachment

    def _attachment_of(self, reply: pb.AttachReply) -> Attachment:
        former = self.last_attachment
        mapped = former.arena if former is not None else None
        if former is not None and former.fingerprint != reply.fingerprint:
            raise Incompatible(f"the store on {self.address} now serves other weights; restart the worker")
        return Attachment(
            lease_id=reply.lease_id,
            lease_ttl=reply.lease_ttl_ms / 1000,
            arena=_map(Path(reply.arena_path), reply.layout_digest, mapped),
            data_endpoint=_own(reply.data_endpoint),
            checkpoint=Path(reply.checkpoint),
            fingerprint=reply.fingerprint,
            all_fit=reply.all_fit,
        )

    async def _give_back(self, lease_id: int) -> None:
        """If there is anyone to give it to."""
        try:
            request = pb.DetachRequest(lease_id=lease_id)
            await self._stub().Detach(request, timeout=_CALL_TIMEOUT)
        except grpc.RpcError as error:
            log.debug("detach failed: %s", error)

    async def _heartbeat(self, attachment: Attachment) -> None:
        try:
            await self._stub().Heartbeat(
                pb.HeartbeatRequest(lease_id=attachment.lease_id), timeout=_CALL_TIMEOUT
            )
        except grpc.RpcError as error:
            self._lose(str(translate(error, self.address)))

    def _lose(self, reason: str) -> None:
        log.warning("lost the store: %s", reason)
        with self._changed:
            self.attachment = None

    async def _return(self) -> None:
        try:
            await self._attach()
            log.info("attached to the store again")
        except (Unavailable, NotFound):
            await asyncio.sleep(_RETRY_PAUSE)
        except ServingError as error:
            log.error("cannot attach to the store: %s", error)
            await asyncio.sleep(_CALL_TIMEOUT)

    def _stub(self) -> ExpertStoreStub:
        assert self._channel is not None
        return ExpertStoreStub(self._channel)


def _own(endpoint: str) -> str:
    try:
        check_own_endpoint(endpoint)
    except OSError as error:  # the store died between its reply and now
        raise Unavailable(f"the store's data plane is gone: {error}") from None
    return endpoint


def _map(path: Path, layout_digest: str, former: MappedArena | None) -> MappedArena:
    if former is not None and former.path == path:
        return former  # only the lease is new: names of segments are not used twice
    try:
        return MappedArena(path, layout_digest)
    except OSError as error:  # the store died between its reply and now, or there is no room for the mapping
        raise Unavailable(f"cannot map the store's arena: {error}") from None
