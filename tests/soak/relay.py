"""A socket between a client and a worker, which can be cut without a word to either."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from common.addresses import Address


class Relay:
    """Passes bytes both ways until it is cut. Owned by one client."""

    def __init__(self, path: Path, worker: Address) -> None:
        self.address = Address.parse(f"unix:{path}")
        self._worker = worker
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = str(self._worker)
        if there.startswith("unix:"):
            onward_reader, onward = await asyncio.open_unix_connection(there.removeprefix("unix:"))
        else:
            host, _, port = there.rpartition(":")
            onward_reader, onward = await asyncio.open_connection(host, int(port))
        self._writers += [writer, onward]
        self._tasks += [
            asyncio.create_task(_pass_on(reader, onward)),
            asyncio.create_task(_pass_on(onward_reader, writer)),
        ]

    def cut(self) -> None:
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.transport.abort()


@asynccontextmanager
async def relay(path: Path, worker: Address) -> AsyncIterator[Relay]:
    made = Relay(path, worker)
    server = await asyncio.start_unix_server(made.serve, path)
    try:
        yield made
    finally:
        server.close()
        made.cut()
        path.unlink(missing_ok=True)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # the other side is gone
    writer.transport.abort()
