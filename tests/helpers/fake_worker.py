"""A worker that answers as it is told: gRPC's own blocking server, no model, no scheduler."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from common.addresses import Address
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.gpu_worker_pb2_grpc import GpuWorkerServicer, add_GpuWorkerServicer_to_server

Answer = Callable[[pb.GenerateRequest, grpc.ServicerContext], Iterator[pb.GenerateEvent]]


def delta(text: str, index: int = 0) -> pb.GenerateEvent:
    return pb.GenerateEvent(delta=pb.Delta(text=text, tokens=[pb.Token(id=len(text))]), index=index)


def finish(index: int = 0) -> pb.GenerateEvent:
    return pb.GenerateEvent(finish=pb.Finish(reason="length"), index=index)


def hello(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
    yield from (delta("hel"), delta("lo"), finish())


def endless(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
    while context.is_active():
        yield delta("x")
        time.sleep(0.02)


def silent(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
    while context.is_active():
        time.sleep(0.02)
    yield from ()


def refusing(status: grpc.StatusCode, text: str = "no", after: int = 0) -> Answer:
    def answer(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
        yield from [delta("x")] * after
        context.abort(status, text)

    return answer


class FakeWorker(GpuWorkerServicer):
    """Gives its answers in turn, the last again and again; can be away in between."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.answers: list[Answer] = [hello]
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[Mapping[str, Any]] = []
        self.ended = threading.Semaphore(0)  # one for each call that has ended
        self.health = health.HealthServicer()

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_GpuWorkerServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self._server.add_insecure_port(str(self.address))
        self._server.start()

    def die(self) -> None:
        self._server.stop(None).wait()

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateEvent]:
        context.add_callback(self.ended.release)
        self.requests.append(request)
        self.metadata.append({item.key: item.value for item in context.invocation_metadata()})
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        yield from answer(request, context)

    def Stats(self, request: pb.WorkerStatsRequest, context: grpc.ServicerContext) -> pb.WorkerStats:
        return pb.WorkerStats(running=3)
