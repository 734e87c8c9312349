"""The data plane: answers workers' STAGE, RELEASE and HINT messages on the event loop.

The socket is drained by a reader callback, not by awaiting each message: a STAGE for a READY frame is then
answered within one wake-up. ZeroMQ takes from its peers in turns, and no more than `_MOST_AT_ONCE` messages
are taken before the loop does what else there is to do, so a peer that floods delays the others and stops
nobody. Each request gets exactly one reply; what a peer or a disk does wrong becomes one here.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import zmq

from common.errors import Exhausted, NotFound
from common.messages import (
    Done,
    Failed,
    Fault,
    Kind,
    Malformed,
    Reply,
    Request,
    Staged,
    pack_reply,
    peek_request_id,
)
from expert_store.frames import FrameTable
from expert_store.leases import LeaseTable
from expert_store.stage_watch import StageWatch
from expert_store.staging import Stager

log = logging.getLogger(__name__)

STAGE_TIMEOUT = 20.0  # seconds until a demand that finds no frame, or a slow disk, is told so
MOST_WAITING = 1024  # demands of one lease; a worker asks for the experts of one layer at a time
_MOST_BYTES = 1 << 20  # of a frame; what is larger than a request, but not that large, is told so
_MOST_AT_ONCE = 256
_FAULTS: dict[type[Exception], Fault] = {
    Exhausted: Fault.NO_FRAME,
    NotFound: Fault.NO_LEASE,
}  # what else goes wrong is the disk's fault


@dataclass
class Counters:
    demands: int = 0
    demands_ready: int = 0
    hints: int = 0
    refused: int = 0  # messages that were answered by an error


class MissLoop:
    """Owns the ROUTER socket."""

    def __init__(self, path: Path, frames: FrameTable, leases: LeaseTable, stager: Stager) -> None:
        self.counters = Counters()
        self.endpoint = f"ipc://{path}"
        self._frames, self._leases, self._stager = frames, leases, stager
        self._waiting: dict[int, set[tuple[bytes, int]]] = {}  # of each lease: the STAGEs without a reply yet
        self._looking = False  # whether `_look` is to be called
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)
        self._socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())  # the kernel says who connects
        self._socket.bind(self.endpoint)
        self._descriptor = int(self._socket.getsockopt(zmq.FD))

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._descriptor, self._drain)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        self._context.destroy(linger=0)

    def _drain(self) -> None:
        # ZeroMQ's descriptor is edge-triggered: it signals again only after everything has been received.
        socket = self._socket
        for _ in range(_MOST_AT_ONCE):
            if socket.closed or not int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            peer, data = socket.recv(), socket.recv()
            while socket.getsockopt(zmq.RCVMORE):  # not a peer of ours: one message is one frame
                part = socket.recv()
                data += part if len(data) <= _MOST_BYTES else b""
            self._receive(peer, data)
        self._look_again()

    def _look_again(self) -> None:
        """In the loop's next turn, and once, however many ask: a flood would make one turn of many looks."""
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._looking = False
        self._drain()

    def _receive(self, peer: bytes, data: bytes) -> None:
        try:
            request = Request.unpack(data)
        except Malformed as error:
            self._reply(peer, Failed(peek_request_id(data), Fault.MALFORMED, str(error)))
            return
        fault = self._refusal(request)
        if fault is not None:
            self._reply(peer, fault)
        elif request.kind is Kind.STAGE:
            self._stage(peer, request)
        else:
            (self._release if request.kind is Kind.RELEASE else self._hint)(request)
            self._reply(peer, Done(request.request_id))

    def _refusal(self, request: Request) -> Failed | None:
        if request.lease_id not in self._leases:
            text = f"lease {request.lease_id:x} has expired; attach again"
            return Failed(request.request_id, Fault.NO_LEASE, text)
        shape = self._frames.arena.shape
        for key in request.keys:
            if key.layer >= shape.layers or key.expert >= shape.experts:
                return Failed(request.request_id, Fault.NO_SUCH_EXPERT, f"there is no {key}")
        return None

    def _stage(self, peer: bytes, request: Request) -> None:
        lease, key, asked = request.lease_id, request.keys[0], (peer, request.request_id)
        waiting = self._waiting.setdefault(lease, set())
        if asked in waiting:
            return  # the same again, because it takes long; one reply answers both
        if len(waiting) >= MOST_WAITING:
            text = f"{MOST_WAITING} demands of this worker are waiting already"
            self._reply(peer, Failed(request.request_id, Fault.BUSY, text))
            return
        ready = self._frames.is_ready(key)
        self.counters.demands += 1
        self.counters.demands_ready += ready
        waiting.add(asked)
        watch = StageWatch(request, ready)

        def end(reply: Reply) -> None:
            watch.end(reply)
            self._reply_unasked(peer, reply)

        def on_staged(error: Exception | None) -> None:
            timer.cancel()
            self._end_wait(lease, asked)
            if error is not None:
                fault = _FAULTS.get(type(error), Fault.UNREADABLE)
                end(Failed(request.request_id, fault, f"{key}: {error}"))
            else:
                end(self._pin(request))

        def on_timeout() -> None:
            self._stager.withdraw(lease, key, on_staged)
            self._end_wait(lease, asked)
            end(self._too_late(request))

        timer = asyncio.get_running_loop().call_later(STAGE_TIMEOUT, on_timeout)
        self._stager.demand(lease, key, on_staged)

    def _end_wait(self, lease: int, asked: tuple[bytes, int]) -> None:
        waiting = self._waiting[lease]
        waiting.remove(asked)
        if not waiting:
            del self._waiting[lease]

    def _too_late(self, request: Request) -> Failed:
        """What a demand has waited for in vain."""
        key, within = request.keys[0], f"within {STAGE_TIMEOUT:.0f} s"
        if self._frames.is_staging(key) or self._stager.is_full():
            text = f"{key}: the disk did not deliver it {within}"
            return Failed(request.request_id, Fault.TOO_SLOW, text)
        pinned, mine = self._frames.pinned_count, self._frames.pinned_by(request.lease_id)
        text = (
            f"{key}: no frame came free {within}: {pinned} of {self._frames.usable} are in use, {mine} of "
            "them by this worker; the store needs a larger --ram or fewer workers"
        )
        return Failed(request.request_id, Fault.NO_FRAME, text)

    def _pin(self, request: Request) -> Reply:
        """Pin a READY frame for the asking lease; the lease may have ended while the disk was read."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        key = request.keys[0]
        self._frames.pin(key, request.lease_id)
        return Staged(request.request_id)

    def _release(self, request: Request) -> None:
        if not request.keys:
            self._frames.unpin_all(request.lease_id)
        for key in request.keys:
            self._frames.unpin(key, request.lease_id)
        self._stager.released(request.lease_id)

    def _hint(self, request: Request) -> None:
        self.counters.hints += len(request.keys)
        for key in request.keys:
            self._stager.hint(request.lease_id, key)

    def _reply_unasked(self, peer: bytes, reply: Reply) -> None:
        """Reply to what may have come long ago. A send may take in what has arrived and with it the
        descriptor's edge, so that must then be looked for, or it would wait for the next message."""
        self._reply(peer, reply)
        self._look_again()

    def _reply(self, peer: bytes, reply: Reply) -> None:
        self.counters.refused += isinstance(reply, Failed)
        try:
            self._socket.send(peer, zmq.SNDMORE | zmq.NOBLOCK)
            self._socket.send(pack_reply(reply), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # The peer is gone (ROUTER drops that silently) or reads nothing: it will time out and ask again.
            log.warning("reply %d could not be sent: %s", reply.request_id, error)
