"""What a job says, on its way from the engine's thread to the stream of its client.

The engine never waits for a client, so what one leaves unread is kept here, and that is bounded: a client
that is MOST_UNREAD messages or UNREAD_BYTES behind is told so at that point of its stream, and its job is
cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from common.errors import Exhausted
from common.units import format_bytes

MOST_UNREAD = 4096  # messages, besides what the transport holds
UNREAD_BYTES = 16 << 20  # of them on the wire; one message more may come on top


@dataclass
class _End:
    """The last thing in an outbox."""

    error: BaseException | None


class Outbox:
    """Owns the messages of one request that its stream has not taken yet. Made on the event loop."""

    def __init__(self) -> None:
        self.on_full: Callable[[], object] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._bytes = 0  # of the messages in it
        self._ended = False

    def emit(self, message: Any) -> None:
        """From any thread; dropped after the end."""
        self._loop.call_soon_threadsafe(self._put, message)

    def end(self, error: BaseException | None) -> None:
        """From any thread; only the first has an effect."""
        self._loop.call_soon_threadsafe(self._end, error)

    async def messages(self) -> AsyncIterator[Any]:
        """Messages until the end; raises its error."""
        while not isinstance(message := await self._queue.get(), _End):
            self._bytes -= message.ByteSize()
            yield message
        if message.error is not None:
            raise message.error

    def _put(self, message: Any) -> None:
        if self._ended:
            return
        unread = self._queue.qsize()
        if unread < MOST_UNREAD and self._bytes < UNREAD_BYTES:
            self._bytes += message.ByteSize()
            self._queue.put_nowait(message)
            return
        size = format_bytes(self._bytes)
        text = (
            f"the client left {unread} messages of its stream unread, {size}; its request was ended for that"
        )
        self._end(Exhausted(f"{text}; read the stream while it comes"))
        self.on_full()

    def _end(self, error: BaseException | None) -> None:
        if not self._ended:
            self._ended = True
            self._queue.put_nowait(_End(error))
