"""The worker's streams for one HTTP request, one for each prompt, merged in the order in which events come.

    async with Generations(streams) as generations:
        while batch := await generations.next():
            ...

Leaving the block cancels what is still going on. A client that reads slowly is waited for: events are read
ahead up to a bound, after which the worker's own bounds apply.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any

from common.rpc import gpu_worker_pb2 as pb

_AHEAD = 256  # events

Event = tuple[int, pb.GenerateEvent]  # with the number of its prompt


class Generations:
    """Owns the streams and the tasks that read them."""

    def __init__(self, streams: Sequence[AsyncIterator[pb.GenerateEvent]]) -> None:
        self._streams = streams
        self._queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue(_AHEAD)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reading = len(streams)

    async def __aenter__(self) -> Generations:
        for number, stream in enumerate(self._streams):
            self._start(self._read(number, stream))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def next(self) -> list[Event]:
        """Events that are there, at least one; none when all streams have ended. Raises their error."""
        events: list[Event] = []
        while self._reading and not (events and self._queue.empty()):
            item = await self._queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                self._reading -= 1
            else:
                events.append(item)
        return events

    def abort(self, error: BaseException) -> None:
        """End with `error`, whatever the streams do."""
        self._start(self._queue.put(error))

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, number: int, stream: AsyncIterator[pb.GenerateEvent]) -> None:
        try:
            async with aclosing(stream) as events:  # type: ignore[type-var] # it is a generator
                async for event in events:
                    await self._queue.put((number, event))
        except Exception as error:  # noqa: BLE001 -- raised where events are read
            await self._queue.put(error)
        else:
            await self._queue.put(None)
