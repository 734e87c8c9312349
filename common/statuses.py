"""A `ServingError` as gRPC sends it: a status, its text, and when to try again, where that is known.

The time is trailing metadata under gRPC's own key (its proposal A6), so that clients which retry by gRPC's
policy wait for it too. Texts may quote what a caller sent, and are shortened to what gRPC's trailers hold:
more would arrive as RESOURCE_EXHAUSTED. Statuses are made errors again by `common.grpc_client`.
"""

from __future__ import annotations

import math
from typing import Any

import grpc

from common.errors import Exhausted, ServingError

_PUSHBACK = "grpc-retry-pushback-ms"
_HEAD, _TAIL = 450, 150  # characters; each may take 12 bytes of the trailers, which hold 8 KiB
_LONGEST = 86_400_000  # milliseconds; what a peer says beyond that is no plan


async def abort(context: grpc.aio.ServicerContext, error: ServingError) -> None:
    """End a call with it; does not return."""
    seconds = error.retry_after if isinstance(error, Exhausted) else None
    trailing = () if seconds is None else ((_PUSHBACK, str(1000 * seconds)),)
    await context.abort(error.status, _shortened(str(error)), trailing)


def retry_after(error: grpc.RpcError) -> int | None:
    """Seconds, if the server has said so."""
    trailing: Any = error.trailing_metadata() or ()  # pairs, of one type or another
    told = dict(trailing).get(_PUSHBACK)
    if not isinstance(told, str) or not told.isdecimal() or len(told) > len(str(_LONGEST)):
        return None
    return math.ceil(min(int(told), _LONGEST) / 1000)


def _shortened(text: str) -> str:
    return text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]} [...] {text[-_TAIL:]}"
