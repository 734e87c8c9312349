"""The client for asyncio: `WorkerClient` with `async` in front of what waits."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.addresses import Address
from common.credentials import Credentials
from common.grpc_client import open_async_channel, translate
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.gpu_worker_pb2_grpc import GpuWorkerStub
from gpu_worker.client.requests import (
    HEALTH_CHECK,
    SHORT_CALL,
    Metadata,
    Prompt,
    generate_request,
    metadata,
    score_request,
    worker_address,
)
from gpu_worker.client.results import Answers, Generated
from gpu_worker.client.retries import RETRY_FOR, Attempts


class AsyncWorkerClient:
    """One channel to one worker, made and used on one event loop. Not for use after `close`."""

    def __init__(
        self,
        address: Address | str | None = None,
        *,
        retry_for: float = RETRY_FOR,
        credentials: Credentials | None = None,
    ) -> None:
        """As for `WorkerClient`."""
        self.address = worker_address(address)
        self._retry_for = retry_for
        self._credentials = credentials or Credentials.of_environment()
        self._channel = open_async_channel(self.address, self._credentials)
        self._stub = GpuWorkerStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def showing(self, api_key: str | None) -> AsyncWorkerClient:
        """This client, showing another API key. Both have one channel, which is closed with either."""
        other = copy.copy(self)
        other._credentials = dataclasses.replace(self._credentials, api_key=api_key)
        return other

    def generate(
        self,
        prompt: Prompt,
        *,
        samples: int = 1,
        priority: int = 0,
        request_id: str | None = None,
        timeout: float | None = None,
        together: int = 1,
        **sampling: Any,
    ) -> AsyncIterator[pb.GenerateEvent]:
        """As `WorkerClient.generate`. `aclose()` cancels; an iterator that is merely dropped is closed when
        the event loop gets to it (`contextlib.aclosing` does it at once)."""
        request = generate_request(prompt, samples, priority, sampling)
        shown = metadata(self._credentials, request_id, together)
        return self._stream(self._stub.Generate, request, timeout, shown)

    async def answers(self, prompt: Prompt, *, samples: int = 1, **options: Any) -> list[Generated]:
        """What `generate` streams, as whole answers in order of their index."""
        answers = Answers(samples)
        async for event in self.generate(prompt, samples=samples, **options):
            answers.add(event)
        return answers.complete()

    def score(
        self,
        text: str | Sequence[int],
        window: int = 0,
        stride: int = 0,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[pb.ScoreEvent]:
        """As `WorkerClient.score`."""
        request = score_request(text, window, stride)
        shown = metadata(self._credentials, request_id)
        return self._stream(self._stub.Score, request, timeout, shown)

    async def model_info(self) -> pb.ModelInfoReply:
        return await self._call(self._stub.ModelInfo, pb.ModelInfoRequest())

    async def stats(self) -> pb.WorkerStats:
        return await self._call(self._stub.Stats, pb.WorkerStatsRequest())

    async def serving(self) -> bool:
        """As `WorkerClient.serving`."""
        try:
            reply = await self._health.Check(HEALTH_CHECK, timeout=SHORT_CALL)
        except grpc.RpcError:
            return False
        return reply.status == health_pb2.HealthCheckResponse.SERVING

    async def close(self) -> None:
        await self._channel.close(grace=None)

    async def __aenter__(self) -> AsyncWorkerClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any) -> Any:
        attempts = Attempts(self._retry_for, SHORT_CALL)
        while True:
            try:
                return await method(request, timeout=attempts.time_left, metadata=metadata(self._credentials))
            except grpc.RpcError as error:
                failure = translate(error, self.address)
            await asyncio.sleep(attempts.pause_after(failure))

    async def _stream(
        self, method: Any, request: Any, timeout: float | None, shown: Metadata
    ) -> AsyncIterator[Any]:
        attempts = Attempts(self._retry_for, timeout)
        while True:
            call, begun = method(request, timeout=attempts.time_left, metadata=shown), False
            try:
                async for event in call:
                    begun = True
                    yield event
                return
            except grpc.RpcError as error:
                failure = translate(error, self.address)
            finally:
                call.cancel()
            if begun:
                raise failure
            await asyncio.sleep(attempts.pause_after(failure))
