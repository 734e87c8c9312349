"""What is kept for a client that does not read: so many messages, and so many bytes."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import Exhausted
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker import outbox
from gpu_worker.outbox import Outbox

MESSAGE = pb.GenerateEvent(delta=pb.Delta(text="x" * 100))


def test_bytes_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read does not count; the request ends where the bound was passed, and is told once."""
    monkeypatch.setattr(outbox, "UNREAD_BYTES", 5 * MESSAGE.ByteSize())

    async def leave_unread() -> None:
        full, box = [], Outbox()
        box.on_full = lambda: full.append(True)
        messages = box.messages()
        for _ in range(20):  # one by one: nothing is left unread
            box.emit(MESSAGE)
            await anext(messages)
        for _ in range(7):
            box.emit(MESSAGE)
        await asyncio.sleep(0)
        assert full == [True]
        for _ in range(5):
            assert await anext(messages) == MESSAGE
        with pytest.raises(Exhausted, match=r"left 5 messages of its stream unread, .*read the stream"):
            await anext(messages)

    asyncio.run(leave_unread())


def test_one_message_may_be_longer_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "UNREAD_BYTES", 1)

    async def read() -> None:
        box = Outbox()
        box.emit(MESSAGE)
        box.end(None)
        assert [message async for message in box.messages()] == [MESSAGE]

    asyncio.run(read())
