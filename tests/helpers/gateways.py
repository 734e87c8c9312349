"""A gateway in this process, before a worker that says what a test tells it to.

Everything async runs on one event loop in a thread of its own, as in the gateway's process; tests use
blocking clients.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from common.addresses import Address
from common.api_keys import KeyRing
from common.errors import ServingError
from common.grpc_server import RpcServer
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.gpu_worker_pb2_grpc import GpuWorkerServicer, add_GpuWorkerServicer_to_server
from gpu_worker.client import AsyncWorkerClient
from gpu_worker.gateway.app import make_app
from gpu_worker.gateway.gateway import Gateway
from gpu_worker.gateway.server import HttpServer

WAIT = 20.0  # seconds; far more than anything here takes
MODEL = "scripted"
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}

Script = Callable[[pb.GenerateRequest], AsyncIterator[pb.GenerateEvent]]


class ScriptedWorker(GpuWorkerServicer):
    """Answers by `script`; keeps what it was asked."""

    def __init__(self) -> None:
        self.info = pb.ModelInfoReply(
            model=MODEL, max_context=1000, has_tokenizer=True, has_chat_template=True
        )
        self.script: Script = says("Hello", " there")
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.cancelled = threading.Semaphore(0)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateEvent]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            async for event in self.script(request):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.release()
            raise

    async def ModelInfo(self, request: pb.ModelInfoRequest, context: Any) -> pb.ModelInfoReply:
        return self.info


def delta(text: str, *tokens: pb.Token, index: int = 0, in_reasoning: bool = False) -> pb.GenerateEvent:
    return pb.GenerateEvent(
        delta=pb.Delta(text=text, tokens=tokens or [pb.Token(id=1)]), index=index, in_reasoning=in_reasoning
    )


def finish(
    reason: str = "eos", index: int = 0, prompt: int = 5, tokens: int = 2, cached: int = 0
) -> pb.GenerateEvent:
    usage = pb.Usage(prompt_tokens=prompt, completion_tokens=tokens, cached_prompt_tokens=cached)
    return pb.GenerateEvent(finish=pb.Finish(reason=reason, usage=usage), index=index)


def events(*script: pb.GenerateEvent | ServingError) -> Script:
    """These, whatever is asked."""

    async def answer(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        for event in script:
            if isinstance(event, ServingError):
                raise event
            yield event

    return answer


def says(*texts: str, reason: str = "eos", in_reasoning: bool = False) -> Script:
    """A text in these pieces, for each sample."""

    async def answer(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        for index in range(request.samples or 1):
            for text in texts:
                yield delta(text, index=index, in_reasoning=in_reasoning)
            yield finish(reason, index=index, tokens=len(texts))

    return answer


def endless(text: str = "x", pause: float = 0.001) -> Script:
    async def answer(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        while True:
            yield delta(text)
            await asyncio.sleep(pause)

    return answer


class Served:
    """Both, running."""

    def __init__(
        self, loop: LoopThread, worker: ScriptedWorker, gateway: Gateway, port: int, rpc: RpcServer
    ) -> None:
        self.loop, self.worker, self.gateway, self.rpc = loop, worker, gateway, rpc
        self.url = f"http://127.0.0.1:{port}"
        self.port = port


class LoopThread:
    """An event loop that runs beside the test."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.start(work).result(WAIT)

    def start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT)
        self._loop.close()


@contextmanager
def serving(
    loop: LoopThread, directory: Path, keys: KeyRing | None = None, request_timeout: float = WAIT
) -> Iterator[Served]:
    """A gateway and its worker, from here to the end of the block."""
    address = Address.parse(f"unix:{directory}/w.sock")
    worker = ScriptedWorker()
    failures: list[BaseException] = []

    async def start(
        listening: socket.socket,
    ) -> tuple[RpcServer, AsyncWorkerClient, Gateway, HttpServer, Any]:
        rpc = RpcServer(address, failures.append)
        add_GpuWorkerServicer_to_server(worker, rpc.server)
        await rpc.start(pb.DESCRIPTOR.services_by_name["GpuWorker"].full_name)
        await rpc.set_serving(True)
        client = AsyncWorkerClient(address, retry_for=0)
        gateway = Gateway(client, None, request_timeout, keys)
        server = HttpServer(make_app(gateway), None)
        return rpc, client, gateway, server, asyncio.ensure_future(server.serve([listening]))

    async def stop() -> None:
        server.should_exit = True
        await task
        await client.close()
        await rpc.stop(0)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        rpc, client, gateway, server, task = loop.run(start(listening))
        try:
            yield Served(loop, worker, gateway, port, rpc)
        finally:
            loop.run(stop())
    assert not failures


def call(
    served: Served, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and the body, parsed if it is JSON. Anything but text is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=WAIT)
    data = body if body is None or isinstance(body, bytes | str | Iterator) else json.dumps(body)
    try:
        chunked = isinstance(data, Iterator)
        connection.request(method, path, data, {**JSON, **(headers or {})}, encode_chunked=chunked)
        response = connection.getresponse()
        text = response.read()
        is_json = response.headers["content-type"].startswith("application/json")
        return response.status, dict(response.headers), json.loads(text) if is_json else text.decode()
    finally:
        connection.close()


def cut(text: str, data: st.DataObject) -> list[str]:
    """A text in pieces, cut anywhere."""
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
