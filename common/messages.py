"""The data plane's wire: every message between a worker (DEALER) and the store (ROUTER), one place.

A message is one ZeroMQ frame: a header of 28 bytes, then `count` expert keys of 4 bytes and the origin of a
STAGE or HINT, which is for logs and traces alone, or the UTF-8 text of an ERROR. All integers are
little-endian. Where an expert lies is said by the arena's directory alone. Every request gets exactly one
reply, which repeats its request id. Records never travel here.

A worker that hears nothing asks again under the same id. So every request may come twice: a STAGE that still
waits takes in its repetitions, and a lease pins an expert or does not, however often it asks.

    STAGE    1 key     make this expert READY and pin it for my lease   -> STAGED | ERROR
    RELEASE  n keys    unpin what I have copied; 0 keys: all of mine    -> DONE | ERROR
    HINT     n keys    I shall probably need these; stage at leisure    -> DONE | ERROR
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from common.expert_key import ExpertKey
from common.origin import NOBODY, Origin

PROTOCOL_VERSION = 2
MAX_KEYS = 4096
_MAGIC = b"XSv1"
_HEADER = struct.Struct("<4sBBHIQQ")  # magic, kind, fault, count, bytes of the origin, request id, lease id
_KEY = struct.Struct("<HH")
assert (_HEADER.size, _KEY.size) == (28, 4)


class Kind(IntEnum):
    STAGE = 1
    RELEASE = 2
    HINT = 3
    STAGED = 65
    DONE = 66
    ERROR = 67


class Fault(IntEnum):
    """Why a request failed; the text of an ERROR says it in words."""

    NONE = 0
    MALFORMED = 1  # not a message of this protocol
    NO_LEASE = 2  # the lease has expired: attach again
    NO_SUCH_EXPERT = 3
    UNREADABLE = 4  # the record could not be read from disk
    NO_FRAME = 5  # every frame is pinned by others, or memory is short
    TOO_SLOW = 6  # the disk did not deliver in time
    BUSY = 7  # this lease has too many demands waiting


# Enum's own look-up takes most of the time of parsing a message.
_KINDS = {kind.value: kind for kind in Kind}
_FAULTS = {fault.value: fault for fault in Fault}


class Malformed(ValueError):
    """Bytes that are no message of this protocol."""


class Request(NamedTuple):
    kind: Kind
    request_id: int
    lease_id: int
    keys: tuple[ExpertKey, ...]
    origin: Origin = NOBODY

    def pack(self) -> bytes:
        origin, counts = self.origin.pack(), len(self.keys)
        header = _HEADER.pack(_MAGIC, self.kind, 0, counts, len(origin), self.request_id, self.lease_id)
        return header + b"".join(_KEY.pack(*key) for key in self.keys) + origin

    @classmethod
    def unpack(cls, data: bytes) -> Request:
        """Raises Malformed for anything but a well-formed request."""
        kind, fault, count, origin_size, request_id, lease_id = _unpack_header(data)
        if kind not in (Kind.STAGE, Kind.RELEASE, Kind.HINT) or fault:
            raise Malformed(f"not a request: kind {kind}, fault {fault}")
        end = _HEADER.size + count * _KEY.size
        if count > MAX_KEYS or len(data) != end + origin_size:
            raise Malformed(
                f"{len(data)} bytes do not hold {count} keys and {origin_size} bytes of an origin"
            )
        if kind is Kind.STAGE and count != 1:
            raise Malformed(f"STAGE names one expert, not {count}")
        keys = tuple(ExpertKey(*pair) for pair in _KEY.iter_unpack(data[_HEADER.size : end]))
        try:
            return cls(kind, request_id, lease_id, keys, Origin.unpack(data[end:]))
        except ValueError as error:
            raise Malformed(str(error)) from None


class Staged(NamedTuple):
    """The expert is READY, and pinned for the asking lease."""

    request_id: int


class Done(NamedTuple):
    request_id: int


class Failed(NamedTuple):
    request_id: int
    fault: Fault
    text: str


Reply = Staged | Done | Failed


def pack_reply(reply: Reply) -> bytes:
    if isinstance(reply, Failed):
        header = _HEADER.pack(_MAGIC, Kind.ERROR, reply.fault, 0, 0, reply.request_id, 0)
        return header + reply.text.encode()
    kind = Kind.STAGED if isinstance(reply, Staged) else Kind.DONE
    return _HEADER.pack(_MAGIC, kind, 0, 0, 0, reply.request_id, 0)


def unpack_reply(data: bytes) -> Reply:
    """Raises Malformed for anything but a well-formed reply."""
    kind, fault, _, _, request_id, _ = _unpack_header(data)
    body = data[_HEADER.size :]
    if kind is Kind.STAGED and not body:
        return Staged(request_id)
    if kind is Kind.DONE and not body:
        return Done(request_id)
    if kind is Kind.ERROR and fault is not Fault.NONE:
        return Failed(request_id, fault, body.decode(errors="replace"))
    raise Malformed(f"not a reply: kind {kind}, {len(data)} bytes")


def peek_request_id(data: bytes) -> int:
    """The id to answer a malformed request under; 0 when even that cannot be told."""
    return int(_HEADER.unpack_from(data)[5]) if len(data) >= _HEADER.size else 0


def request(
    kind: Kind, request_id: int, lease_id: int, keys: Sequence[ExpertKey], origin: Origin = NOBODY
) -> bytes:
    return Request(kind, request_id, lease_id, tuple(keys), origin).pack()


def _unpack_header(data: bytes) -> tuple[Kind, Fault, int, int, int, int]:
    if len(data) < _HEADER.size:
        raise Malformed(f"{len(data)} bytes are too few for a header")
    magic, kind, fault, count, origin_size, request_id, lease_id = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise Malformed(f"magic {magic!r} is not {_MAGIC!r}")
    if kind not in _KINDS or fault not in _FAULTS:
        raise Malformed(f"there is no kind {kind} or no fault {fault}")
    return _KINDS[kind], _FAULTS[fault], count, origin_size, request_id, lease_id
