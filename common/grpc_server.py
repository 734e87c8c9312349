"""The gRPC server that both processes run: one address, health, reflection, and errors as statuses.

Services raise `ServingError`s; the interceptor here is the one place where they become replies. Anything else
is a broken invariant: the caller gets INTERNAL, and the process is told to stop.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.addresses import Address
from common.errors import ConfigError, ServingError

log = logging.getLogger(__name__)

PACKAGE = "expert_serving.v1"  # of proto/*.proto
MAX_MESSAGE_BYTES = 64 << 20
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on one port must fail, not share it
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]


class RpcServer:
    """Owns the server and its health; `SERVING` is said only when the process is ready to work."""

    def __init__(self, address: Address, on_fatal: Callable[[BaseException], None]) -> None:
        self.address = address
        self.server = grpc.aio.server(interceptors=[_ErrorsToStatuses(on_fatal)], options=_OPTIONS)
        self._started = False
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined] # missing in its stubs
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)

    async def start(self, service: str) -> None:
        """Listen; `service` is the full name of the one service added to `.server` before."""
        names = (service, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)
        await self.set_serving(False)
        try:
            self.server.add_insecure_port(str(self.address))
        except RuntimeError:
            raise ConfigError(f"cannot listen on {self.address}: address in use, or not ours") from None
        await self.server.start()
        self._started = True

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self._health.set("", status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, give running ones `grace` seconds. No effect before `start` has ended."""
        if not self._started:
            return
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace)


class _ErrorsToStatuses(grpc.aio.ServerInterceptor):
    def __init__(self, on_fatal: Callable[[BaseException], None]) -> None:
        self._on_fatal = on_fatal

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(f"/{PACKAGE}."):
            return handler  # health and reflection answer for themselves
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream), **codecs)
        return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary), **codecs)

    def _unary(self, method: Any) -> Any:
        async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                return await method(request, context)
            except Exception as error:  # noqa: BLE001 -- every failure becomes exactly one reply
                await self._abort(context, error)

        return guarded

    def _stream(self, method: Any) -> Any:
        async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                async for reply in method(request, context):
                    yield reply
            except Exception as error:  # noqa: BLE001 -- every failure becomes exactly one reply
                await self._abort(context, error)

        return guarded

    async def _abort(self, context: grpc.aio.ServicerContext, error: Exception) -> None:
        if isinstance(error, ServingError):
            await context.abort(error.status, str(error))
        log.critical("a broken invariant ended a call", exc_info=error)
        self._on_fatal(error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the process stops, see its log")
