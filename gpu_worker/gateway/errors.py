"""Errors in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, with the status of each.

Here is what each kind of failure becomes: a body that does not validate, a `ServingError` of the worker, a
path or method that does not exist, and whatever else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import grpc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from common.errors import Exhausted, ServingError
from common.logs import printable
from gpu_worker.gateway.requests import NEUTRAL_ONLY

log = logging.getLogger(__name__)

# Seconds, where an error does not say: a place in the queue, or a worker that restarts, may be there by then.
RETRY_AFTER = "1"
_INVALID = "invalid_request_error"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    error: ErrorDetail


class RequestError(Exception):
    """An error with its status, ready to be sent."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`retry_after`: seconds, for a status that says so."""
        super().__init__(message)
        self.status = status
        self._retry_after = RETRY_AFTER if retry_after is None else str(retry_after)
        where = None if param is None else _text(param)
        self.detail = ErrorDetail(message=_text(message), type=kind, param=where, code=code)

    def body(self) -> bytes:
        return json.dumps({"error": self.detail.model_dump()}).encode()  # in ASCII, whatever was quoted

    def response(self) -> Response:
        headers = {}
        if self.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            headers["Retry-After"] = self._retry_after
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(self.body(), self.status, headers, media_type="application/json")


def _text(quoted: str) -> str:
    """What a reply can hold: a client's own words may have lone surrogates, which are no text."""
    return quoted.encode(errors="replace").decode()


def model_not_found(name: str) -> RequestError:
    return RequestError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")


def internal_error() -> RequestError:
    return RequestError(500, "internal error; the gateway's log has more", "server_error")


def not_passed_on(error: Exception) -> RequestError:
    """What no message to the worker can hold."""
    return RequestError(400, f"the request cannot be passed on: {error}", code="invalid_value")


# By the status that the worker gave, or that common.errors says.
_BY_STATUS: dict[grpc.StatusCode, tuple[int, str, str | None]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, _INVALID, "invalid_value"),
    grpc.StatusCode.OUT_OF_RANGE: (400, _INVALID, "invalid_value"),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error", "invalid_api_key"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error", None),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "rate_limit_exceeded"),
    grpc.StatusCode.UNAVAILABLE: (503, "service_unavailable_error", "service_unavailable"),
    grpc.StatusCode.CANCELLED: (503, "service_unavailable_error", "cancelled"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error", "timeout"),
}


def of_serving_error(error: ServingError) -> RequestError:
    status, kind, code = _BY_STATUS.get(error.status, (500, "server_error", None))
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("the worker failed: %s", printable(str(error)))
    retry_after = error.retry_after if isinstance(error, Exhausted) else None
    return RequestError(status, str(error), kind, code=code, retry_after=retry_after)


def of_validation(errors: Sequence[Any], body: Any) -> RequestError:
    """The first thing that is wrong with a body, by the name it has there."""
    first = min(errors, key=lambda error: -len(_path(error["loc"][1:], body)))
    path, kind, message = _path(first["loc"][1:], body), first["type"], first["msg"]
    param = _written(path) or None
    if kind == "json_invalid":
        return RequestError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if not path and kind in ("missing", "model_attributes_type", "model_type"):
        text = "send a JSON object, with the header Content-Type: application/json"
        return RequestError(400, text, code="invalid_json")
    if kind == "missing":
        return RequestError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        text = f"unrecognized request argument: {param}"
        return RequestError(400, text, param=param, code="unknown_parameter")
    text = message.removeprefix("Value error, ")
    if param in NEUTRAL_ONLY:
        text += " (nothing else is supported here)"
    return RequestError(400, f"{param}: {text}" if param else text, param=param, code="invalid_value")


def install(app: FastAPI) -> None:
    """Every failure that `app` expects becomes one of these; those that it does not, `middleware` handles."""
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http)


async def _on_validation(request: Request, error: Any) -> Response:
    return of_validation(error.errors(), error.body).response()


async def _on_serving_error(request: Request, error: Any) -> Response:
    return of_serving_error(error).response()


async def _on_request_error(request: Request, error: Any) -> Response:
    return error.response()


async def _on_http(request: Request, error: Any) -> Response:
    """Unknown routes, wrong methods, and what a middleware refused."""
    text = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND:
        text = f"unknown URL: {request.method} {request.url.path}"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        text = f"{request.method} is not allowed here"
    response = RequestError(error.status_code, text).response()
    response.headers.update(error.headers or {})
    return response


def _path(loc: Sequence[Any], body: Any) -> list[Any]:
    """`loc` without what names a branch of a union: what is left leads to a place in the body."""
    path: list[Any] = []
    node = body
    for step in loc:
        if (isinstance(node, dict) and step in node) or (isinstance(node, list) and isinstance(step, int)):
            node = node[step]
        elif not (step == loc[-1] and isinstance(node, dict) and str(step).isidentifier()):
            continue
        path.append(step)
    return path


def _written(path: Sequence[Any]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")
