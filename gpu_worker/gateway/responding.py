"""A reply on its way: the worker's events are read, made pieces, and sent as they come or all at once.

Nothing is sent before the worker's first event, so that what it refuses has a status of its own. After that
an error is the last event of the stream. When the client goes away, the worker's calls are cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.errors import ServingError, Unavailable
from gpu_worker.gateway.answers import Answers, UsageCount
from gpu_worker.gateway.caller import CLIENT_GONE, Caller
from gpu_worker.gateway.errors import of_serving_error
from gpu_worker.gateway.gateway import Gateway
from gpu_worker.gateway.generations import Event, Generations
from gpu_worker.gateway.prompts import Asked
from gpu_worker.gateway.replies import Reply

_GRACE = 5.0  # seconds beyond the request's time, for a client to take what is there
_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # for nginx, which would hold events back
}
_DONE = b"data: [DONE]\n\n"


class AnswerResponse(Response):
    """Asks the worker when it is sent."""

    def __init__(self, gateway: Gateway, caller: Caller, route: str, asked: Asked, answers: Answers) -> None:
        super().__init__()
        self._gateway, self._caller, self._asked, self._answers = gateway, caller, asked, answers
        self._first_token = gateway.metrics.first_token.labels(route)
        self._started = time.monotonic()
        self._waiting = True  # for the first token
        self._usage = UsageCount()
        self._unfinished = len(asked.prompts) * asked.samples

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, unless the client goes away before that, or does not take what is sent."""
        with self._gateway.request(self._caller):
            working = asyncio.ensure_future(self._answer(send))
            leaving = asyncio.ensure_future(_gone(receive))
            try:
                await asyncio.wait(
                    {working, leaving},
                    timeout=self._gateway.request_timeout + _GRACE,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if working.done():
                    working.result()
                else:  # nobody is there to be told
                    self._caller.status = CLIENT_GONE
            finally:
                working.cancel()
                leaving.cancel()
                await asyncio.gather(working, leaving, return_exceptions=True)

    async def _answer(self, send: Send) -> None:
        async with self._gateway.generate(self._asked, self._caller) as generations:
            pieces: list[Reply] = []
            while batch := await generations.next():
                pieces += self._pieces(batch)
            self._check_finished()
        whole = self._answers.whole(pieces, self._usage.total()).json_bytes()
        self._count_tokens()
        headers = {"Content-Length": str(len(whole)), "Content-Type": "application/json"}
        await send(_start(headers))
        await send({"type": "http.response.body", "body": whole})

    def _pieces(self, batch: Sequence[Event]) -> list[Reply]:
        pieces = []
        for prompt, event in batch:
            if event.HasField("finish"):
                self._usage.add(prompt, event.finish.usage)
                self._unfinished -= 1
            if (piece := self._answers.add(prompt, event)) is not None:
                pieces.append(piece)
        if pieces and self._waiting:
            self._waiting = False
            self._first_token.observe(time.monotonic() - self._started)
        return pieces

    def _check_finished(self) -> None:
        if self._unfinished:
            raise Unavailable("the worker's answer ended early; it may have died")

    def _count_tokens(self) -> None:
        usage = self._usage.total()
        self._gateway.metrics.prompt_tokens.inc(usage.prompt_tokens)
        self._gateway.metrics.completion_tokens.inc(usage.completion_tokens)


class StreamedResponse(AnswerResponse):
    """The same as server-sent events."""

    def __init__(self, *args: Any, include_usage: bool) -> None:
        super().__init__(*args)
        self._include_usage = include_usage

    async def _answer(self, send: Send) -> None:
        async with self._gateway.generate(self._asked, self._caller) as generations:
            batch = await generations.next()
            await send(_start(_STREAM))
            try:
                await self._stream(send, generations, batch)
            except ServingError as error:
                refused = of_serving_error(error)
                self._caller.status = refused.status
                await send(_part(_event(refused.body())))
        await send({"type": "http.response.body", "body": b""})

    async def _stream(self, send: Send, generations: Generations, batch: list[Event]) -> None:
        pieces = self._answers.opening()
        while batch:
            if pieces := pieces + self._pieces(batch):
                await send(_part(b"".join(_event(piece.json_bytes()) for piece in pieces)))
            pieces, batch = [], await generations.next()
        self._check_finished()
        self._count_tokens()
        last = [self._answers.last(self._usage.total())] if self._include_usage else []
        await send(_part(b"".join(_event(piece.json_bytes()) for piece in last) + _DONE))


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _start(headers: dict[str, str]) -> dict[str, Any]:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": 200, "headers": raw}


def _part(body: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": True}


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
