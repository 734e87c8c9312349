"""The one place where a gRPC server asks for API keys: an interceptor before everything else.

Health answers anybody, so that load balancers and `wait` need no key. All else wants one, reflection too.
Stopping, and what tells of all requests, want an admin's. Calls that stream are the work, and count against
the limits of their key.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health

from common.api_keys import KeyRing
from common.errors import PermissionDenied, ServingError
from common.key_usage import TOGETHER, KeyUsage
from common.statuses import abort

log = logging.getLogger(__name__)

_FOR_ADMINS = ("/Stop", "/Stats")
_MAKERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class KeyGuard(grpc.aio.ServerInterceptor):
    """To be the first interceptor: it ends refused calls by itself."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None or details.method.startswith(f"/{health.SERVICE_NAME}/"):
            return handler
        try:
            shown = _words(details)
            usage = self._keys.find(shown.get("authorization"))
            usage.check_possible(_count(shown.get(TOGETHER, "")))
            if details.method.endswith(_FOR_ADMINS) and not usage.rules.admin:
                raise PermissionDenied(
                    f"key {usage.name!r} is no admin's, and {details.method} is for them alone"
                )
        except ServingError as error:
            return _refusing(handler, details.method, error)
        if handler.response_streaming and not handler.request_streaming:
            return _remade(handler, _counted(usage, handler.unary_stream, details.method))
        return handler


def _words(details: grpc.HandlerCallDetails) -> dict[str, str]:
    """Of a call's metadata, what is text."""
    return {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}


def _count(told: str) -> int:
    return int(told) if told.isdecimal() and len(told) < 10 else 1


def _counted(usage: KeyUsage, method: Any, name: str) -> Any:
    async def counted(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            usage.begin()
        except ServingError as error:
            await _refuse(context, name, error)
        try:
            async with aclosing(method(request, context)) as replies:
                async for reply in replies:
                    yield reply
        finally:
            usage.end()

    return counted


async def _refuse(context: grpc.aio.ServicerContext, method: str, error: ServingError) -> None:
    log.info("refused %s to %s: %s", method, context.peer(), error)
    await abort(context, error)


def _refusing(handler: grpc.RpcMethodHandler, method: str, error: ServingError) -> grpc.RpcMethodHandler:
    async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
        await _refuse(context, method, error)

    async def refuse_stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        await refuse(request, context)
        yield

    return _remade(handler, refuse_stream if handler.response_streaming else refuse)


def _remade(handler: grpc.RpcMethodHandler, method: Any) -> grpc.RpcMethodHandler:
    make = _MAKERS[handler.request_streaming, handler.response_streaming]
    return make(
        method,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
