"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.addresses import Address
from common.credentials import Credentials
from common.grpc_client import open_channel, translate
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


class WorkerClient:
    """One channel to one worker, for any number of threads. Not for use after `close`."""

    def __init__(
        self,
        address: Address | str | None = None,
        *,
        retry_for: float = RETRY_FOR,
        credentials: Credentials | None = None,
    ) -> None:
        """`address`: `HOST:PORT` or `unix:PATH`; by default, this user's worker. `retry_for`: seconds within
        which a call that has produced nothing is made again when the worker is not there, is about to end, or
        has said when the key may ask again; 0: never. `credentials`: by default, those of the environment."""
        self.address = worker_address(address)
        self._retry_for = retry_for
        self._credentials = credentials or Credentials.of_environment()
        self._channel = open_channel(self.address, self._credentials)
        self._stub = GpuWorkerStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

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
    ) -> Iterator[pb.GenerateEvent]:
        """Stream continuations of text, token ids, or a chat; `samples` of them, told apart by `index`.

        The request is sent when the first event is asked for, and cancelled when the iterator is closed.
        `timeout` is for the whole answer, in seconds. Where several calls are made at once and all of them
        are wanted, `together` says how many, so that none is accepted if not all can be. `sampling` are the
        fields of `SamplingParams` in proto/gpu_worker.proto.
        """
        request = generate_request(prompt, samples, priority, sampling)
        shown = metadata(self._credentials, request_id, together)
        return self._stream(self._stub.Generate, request, timeout, shown)

    def answers(self, prompt: Prompt, *, samples: int = 1, **options: Any) -> list[Generated]:
        """What `generate` streams, as whole answers in order of their index."""
        answers = Answers(samples)
        for event in self.generate(prompt, samples=samples, **options):
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
    ) -> Iterator[pb.ScoreEvent]:
        """Stream the log-probabilities of a text or of token ids; 0 means the worker's default."""
        request = score_request(text, window, stride)
        shown = metadata(self._credentials, request_id)
        return self._stream(self._stub.Score, request, timeout, shown)

    def model_info(self) -> pb.ModelInfoReply:
        return self._call(self._stub.ModelInfo, pb.ModelInfoRequest())

    def stats(self) -> pb.WorkerStats:
        return self._call(self._stub.Stats, pb.WorkerStatsRequest())

    def serving(self) -> bool:
        """Whether the worker takes requests: it is there, has loaded its model, and is not about to end."""
        try:
            reply = self._health.Check(HEALTH_CHECK, timeout=SHORT_CALL)
        except grpc.RpcError:
            return False
        return reply.status == health_pb2.HealthCheckResponse.SERVING

    def stop(self) -> pb.StopWorkerReply:
        """Ask the worker to end in good order; says what it finishes first."""
        try:
            shown = metadata(self._credentials)
            return self._stub.Stop(pb.StopWorkerRequest(), timeout=SHORT_CALL, metadata=shown)
        except grpc.RpcError as error:
            raise translate(error, self.address) from None

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        attempts = Attempts(self._retry_for, SHORT_CALL)
        while True:
            try:
                return method(request, timeout=attempts.time_left, metadata=metadata(self._credentials))
            except grpc.RpcError as error:
                failure = translate(error, self.address)
            time.sleep(attempts.pause_after(failure))

    def _stream(self, method: Any, request: Any, timeout: float | None, shown: Metadata) -> Iterator[Any]:
        attempts = Attempts(self._retry_for, timeout)
        while True:
            call, begun = method(request, timeout=attempts.time_left, metadata=shown), False
            try:
                for event in call:
                    begun = True
                    yield event
                return
            except grpc.RpcError as error:
                failure = translate(error, self.address)
            finally:
                call.cancel()
            if begun:
                raise failure
            time.sleep(attempts.pause_after(failure))
