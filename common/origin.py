"""On whose behalf this thread or task works: the ids of requests, and the trace that they belong to.

Set where a request comes in, and around each step of the engine. Read by whoever logs, and by whoever asks
another process for something, so that it goes along: as gRPC metadata from client to worker, in the data
plane's messages from worker to store. Nothing depends on it but what people read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

REQUEST_ID = "x-request-id"  # keys of gRPC metadata and of HTTP headers
TRACEPARENT = "traceparent"

MAX_PACKED = 1024  # bytes
_WORD = re.compile(r"[!-~]+")  # printable ASCII
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_UNTRACED = "-"


class Origin(NamedTuple):
    """Several requests share a step of the engine; a trace is then the first one's that has one."""

    requests: tuple[str, ...] = ()
    traceparent: str = ""  # W3C trace context; empty where nothing is traced

    @classmethod
    def merged(cls, origins: Iterable[Origin]) -> Origin:
        """Of work that is done for all of them at once."""
        origins = list(origins)
        if len(origins) == 1:
            return origins[0]
        ids = dict.fromkeys(name for origin in origins for name in origin.requests)
        return cls(tuple(ids), next((o.traceparent for o in origins if o.traceparent), ""))

    def pack(self) -> bytes:
        """Words of printable ASCII; nothing for nobody. Ids that do not fit are left out."""
        return _packed(self)

    @classmethod
    def unpack(cls, data: bytes) -> Origin:
        """Raises ValueError for anything that `pack` does not make."""
        return _unpacked(data)


NOBODY = Origin()
_current: ContextVar[Origin] = ContextVar("origin", default=NOBODY)


def current() -> Origin:
    return _current.get()


def work_for(origin: Origin) -> None:
    """From now on, to the end of the task that says so."""
    _current.set(origin)


@contextmanager
def working_for(origin: Origin) -> Iterator[None]:
    """In the block."""
    token = _current.set(origin)
    try:
        yield
    finally:
        _current.reset(token)


@lru_cache(maxsize=16)  # one step asks for many experts
def _packed(origin: Origin) -> bytes:
    traceparent = origin.traceparent if is_traceparent(origin.traceparent) else _UNTRACED
    words = [traceparent, *filter(_WORD.fullmatch, origin.requests)]
    if words == [_UNTRACED]:
        return b""
    while sum(map(len, words)) + len(words) - 1 > MAX_PACKED:
        words.pop()
    return " ".join(words).encode()


@lru_cache(maxsize=64)
def _unpacked(data: bytes) -> Origin:
    if not data:
        return NOBODY
    traceparent, *names = data.decode("ascii", errors="replace").split(" ")
    traced = is_traceparent(traceparent)
    if len(data) > MAX_PACKED or not all(map(_WORD.fullmatch, names)):
        raise ValueError("an origin is not words of printable ASCII")
    if not traced and (traceparent != _UNTRACED or not names):
        raise ValueError(f"an origin has no trace context {traceparent!r}")
    return Origin(tuple(names), traceparent if traced else "")


def is_traceparent(text: str) -> bool:
    """Whether a text that came from outside is a W3C trace context."""
    return _TRACEPARENT.fullmatch(text) is not None
