"""Around every HTTP request: its id in and out, limits to its body, its metrics, span and line in the log.

Plain ASGI, because Starlette's base class for middleware hides from endpoints that a client went away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common import origin, tracing
from common.errors import Unauthenticated
from common.logs import fields
from gpu_worker.gateway.caller import CLIENT_GONE, Caller
from gpu_worker.gateway.errors import internal_error, of_serving_error
from gpu_worker.gateway.gateway import Gateway

log = logging.getLogger(__name__)

HEALTH, METRICS = "/health", "/metrics"
MAX_BODY_BYTES = 8 << 20
BODY_TIMEOUT = 30.0  # seconds that a client may take to send one
_CLOSE = {"Connection": "close"}  # what is left of the body is not read


class Envelope:
    """Adds a `Caller` to the state of each request, whose API key is known if keys are asked for."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        caller = Caller.of(headers)
        scope.setdefault("state", {})["caller"] = caller
        span = tracing.span("gateway request", caller.traceparent)
        origin.work_for(origin.Origin((caller.request_id,), span.traceparent))

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                caller.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = caller.request_id
            await send(message)

        started = time.monotonic()
        try:
            if scope["path"] != HEALTH:  # which load balancers ask for, without a key
                self._gateway.authenticate(caller)
            await self._app(scope, _LimitedBody(receive, headers), labelled)
        except Unauthenticated as error:
            await of_serving_error(error).response()(scope, receive, labelled)
        except Exception as error:  # a bug, of which the client is told nothing but that
            if caller.status != CLIENT_GONE:
                raise
            log.error("a request failed", exc_info=error)
            await internal_error().response()(scope, receive, labelled)
        finally:
            self._note(scope, caller, span, time.monotonic() - started)

    def _note(self, scope: Scope, caller: Caller, span: tracing.Span, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        metrics = self._gateway.metrics
        metrics.requests.labels(route, str(caller.status)).inc()
        metrics.duration.labels(route).observe(seconds)
        failed = caller.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        named = {"http.request.method": scope["method"], "http.route": route}
        named |= {"expert_serving.request_id": caller.request_id}
        span.end(str(caller.status) if failed else "", {**named, "http.response.status_code": caller.status})
        asked_often = route in (HEALTH, METRICS)
        level = logging.WARNING if failed else logging.DEBUG if asked_often else logging.INFO
        log.log(
            level,
            "%s %s: %d after %.3f s",
            scope["method"],
            ascii(scope["path"]),  # a client's, in a line of its own
            caller.status,
            seconds,
            extra=fields(
                request_id=caller.request_id,
                route=route,
                status=caller.status,
                duration_seconds=round(seconds, 6),
            ),
        )


class _LimitedBody:
    """A `receive` that refuses bodies which are too long, or take too long to come."""

    def __init__(self, receive: Receive, headers: Headers) -> None:
        self._receive = receive
        declared = headers.get("content-length", "")
        self._size = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
        self._declared = self._size
        self._deadline = time.monotonic() + BODY_TIMEOUT
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        self._check()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except asyncio.TimeoutError:
            text = f"the request's body did not come within {BODY_TIMEOUT:g} s"
            raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, text, _CLOSE) from None
        if not self._declared:
            self._size += len(message.get("body", b""))
            self._check()
        self._complete = not message.get("more_body", False)
        return message

    def _check(self) -> None:
        if self._size > MAX_BODY_BYTES:
            text = f"the request's body has more than {MAX_BODY_BYTES >> 20} MiB"
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text, _CLOSE)
