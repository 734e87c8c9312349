"""The gRPC server that both processes run: one address, health, reflection, and errors as statuses.

Services raise `ServingError`s; the interceptor here is the one place where they become replies. Anything else
is a broken invariant: the caller gets INTERNAL, and the process is told to stop.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.addresses import Address
from common.api_keys import KeyRing
from common.errors import ConfigError, InvalidRequest, ServingError
from common.key_guard import KeyGuard
from common.process import connections_allowed
from common.statuses import abort
from common.tls import ServerTls

log = logging.getLogger(__name__)

Parse = Callable[[bytes], Any]

PACKAGE = "expert_serving.v1"  # of proto/*.proto
MAX_MESSAGE_BYTES = 64 << 20
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on one port must fail, not share it
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A client whose machine is gone closes nothing; without pings its requests would run to their end.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # a minute if left alone, whatever the other one says
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # what clients may do without being cut off
]
# What the system has no more of is nobody's mistake: that call fails, and the process lives.
_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC)


class RpcServer:
    """Owns the server and its health; `SERVING` is said only when the process is ready to work."""

    def __init__(
        self,
        address: Address,
        on_fatal: Callable[[BaseException], None],
        tls: ServerTls | None = None,
        keys: KeyRing | None = None,
    ) -> None:
        """Without `keys`, whoever can connect may call."""
        self.address, self._tls = address, tls
        self._asks_clients = keys is not None or (tls is not None and tls.asks_clients)
        options = [*_OPTIONS, ("grpc.max_allowed_incoming_connections", connections_allowed())]
        guard = [KeyGuard(keys)] if keys is not None else []
        self.server = grpc.aio.server(interceptors=[*guard, _ErrorsToStatuses(on_fatal)], options=options)
        self._started = False
        self._service = ""
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined] # missing in its stubs
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)

    async def start(self, service: str) -> None:
        """Listen; `service` is the full name of the one service added to `.server` before."""
        self._service = service
        names = (service, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)
        await self.set_serving(False)
        try:
            if self._tls is not None:
                self.server.add_secure_port(str(self.address), self._tls.credentials())
            else:
                self.server.add_insecure_port(str(self.address))
        except RuntimeError:
            raise ConfigError(f"cannot listen on {self.address}: address in use, or not ours") from None
        await self.server.start()
        self._started = True
        if self.address.socket_path is None and not self._asks_clients:
            log.warning("%s answers whoever can reach it, and lets them stop this process", self.address)

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", self._service):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

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
        # Requests are parsed in here too, so that what cannot be parsed is answered like any other mistake.
        parse, serializer = handler.request_deserializer, handler.response_serializer
        assert parse is not None
        if handler.response_streaming:
            stream = self._stream(parse, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(stream, None, serializer)
        return grpc.unary_unary_rpc_method_handler(self._unary(parse, handler.unary_unary), None, serializer)

    def _unary(self, parse: Parse, method: Any) -> Any:
        async def guarded(request: bytes, context: grpc.aio.ServicerContext) -> Any:
            try:
                return await method(_parsed(parse, request), context)
            except Exception as error:  # noqa: BLE001 -- every failure becomes exactly one reply
                await self._abort(context, error)

        return guarded

    def _stream(self, parse: Parse, method: Any) -> Any:
        async def guarded(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                async with aclosing(method(_parsed(parse, request), context)) as replies:
                    async for reply in replies:
                        yield reply
            except Exception as error:  # noqa: BLE001 -- every failure becomes exactly one reply
                await self._abort(context, error)

        return guarded

    async def _abort(self, context: grpc.aio.ServicerContext, error: Exception) -> None:
        if isinstance(error, ServingError):
            await abort(context, error)
        if isinstance(error, OSError) and error.errno in _RESOURCES:
            log.error("a call failed: %s", error)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the process lacks resources: {error}")
        log.critical("a broken invariant ended a call", exc_info=error)
        self._on_fatal(error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the process stops, see its log")


def _parsed(parse: Parse, request: bytes) -> Any:
    try:
        return parse(request)
    except DecodeError:
        raise InvalidRequest("the request is not a message of this protocol, or was damaged") from None
