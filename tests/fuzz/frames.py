"""Frames to the store's data plane: whatever comes, each message gets one reply that bears its id.

Sent in batches by one peer that has a lease and keeps it, so that replies can be told apart by their ids. Now
and then somebody connects who does not speak ZeroMQ at all.
"""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from contextlib import suppress

import grpc
import zmq

from common.addresses import Address
from common.expert_key import ExpertKey
from common.grpc_client import channel_to
from common.messages import PROTOCOL_VERSION, Failed, Kind, peek_request_id, request, unpack_reply
from common.origin import Origin
from common.rpc import expert_store_pb2 as pb
from common.rpc.expert_store_pb2_grpc import ExpertStoreStub
from tests.fuzz.mutate import mutated, some_bytes
from tests.fuzz.tally import Tally

LIMIT = 30.0  # seconds until replies that have not come count as lost
_BATCH = 100
_GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00NULL" + bytes(48)  # of ZMTP 3


def run(tally: Tally, numbers: range, store: Address) -> None:
    """The store must have every record in memory: a demand then never waits."""
    with channel_to(store) as channel, zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        stub = ExpertStoreStub(channel)
        attached = _attach(stub)
        lease = attached.lease_id
        peer.linger = 0
        peer.connect(attached.data_endpoint)
        for first in numbers[::_BATCH]:
            lease = _kept(stub, lease)
            batch = range(first, min(first + _BATCH, numbers.stop))
            sent: Counter[int] = Counter()
            for case in batch:
                draw = tally.draw(case)
                if draw.random() < 0.01:
                    _speak_otherwise(draw, attached.data_endpoint.removeprefix("ipc://"))
                    tally.outcome("no ZeroMQ")
                    continue
                parts = message(draw, lease)
                peer.send_multipart(parts)
                sent[peek_request_id(b"".join(parts))] += 1
            got = _replies(tally, peer, sent.total())
            if got != sent:
                tally.fault(
                    first, f"and the {len(batch)} from it on: lost {sent - got}, unasked {got - sent}"
                )
        stub.Detach(pb.DetachRequest(lease_id=lease))
        if pinned := stub.Stats(pb.StoreStatsRequest()).pinned_frames:
            tally.fault(numbers.stop, f"{pinned} frames are pinned in the end")


def _attach(stub: ExpertStoreStub) -> pb.AttachReply:
    return stub.Attach(pb.AttachRequest(protocol_version=PROTOCOL_VERSION, worker="fuzz", pid=1))


def _kept(stub: ExpertStoreStub, lease: int) -> int:
    """The same lease, or a new one if a busy machine has let it expire."""
    try:
        stub.Heartbeat(pb.HeartbeatRequest(lease_id=lease))
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return _attach(stub).lease_id
    return lease


def message(draw: random.Random, lease: int) -> list[bytes]:
    """A request that may be good, or was, or never; in one part, as it should be, or in several."""
    if draw.random() < 0.1:
        data = some_bytes(draw)
    else:
        kind = draw.choice((Kind.STAGE, Kind.RELEASE, Kind.HINT))
        count = 1 if kind is Kind.STAGE and draw.random() < 0.9 else draw.choice((0, 1, 2, 3, 30))
        count = 5000 if draw.random() < 0.01 else count
        keys = [ExpertKey(draw.choice((0, 0, 1, 65535)), draw.choice((0, 1, 2, 65535))) for _ in range(count)]
        whose = lease if draw.random() < 0.8 else draw.choice((0, lease + 1, 2**64 - 1))
        origin = Origin(("a request",) * draw.choice((0, 0, 1)))
        data = request(kind, draw.getrandbits(64), whose, keys, origin)
        if draw.random() < 0.6:
            data = mutated(draw, data)
    if draw.random() < 0.05:
        place = draw.randrange(len(data) + 1)
        return [data[:place], data[place:]]
    return [data]


def _replies(tally: Tally, peer: zmq.Socket[bytes], count: int) -> Counter[int]:
    """By request id, as many as there should be, and whatever else comes on top."""
    got: Counter[int] = Counter()
    until = time.monotonic() + LIMIT
    while got.total() < count and time.monotonic() < until:
        if peer.poll(1000):
            _note(tally, got, peer.recv())
    while peer.poll(0):
        _note(tally, got, peer.recv())
    return got


def _note(tally: Tally, got: Counter[int], data: bytes) -> None:
    reply = unpack_reply(data)
    got[reply.request_id] += 1
    tally.outcome(reply.fault.name if isinstance(reply, Failed) else type(reply).__name__)


def _speak_otherwise(draw: random.Random, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(LIMIT)
        connection.connect(path)
        with suppress(OSError):  # it has hung up already
            connection.sendall((_GREETING if draw.random() < 0.5 else b"") + some_bytes(draw))
