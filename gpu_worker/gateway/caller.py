"""Who asks, and what became of it: the state of one HTTP request."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers

from common import origin
from common.key_usage import KeyUsage

CLIENT_GONE = 499  # nginx's word for it
_REQUEST_ID = re.compile(r"[!-~]{1,128}")  # what is in log lines and headers as it is


@dataclass
class Caller:
    """Request id, trace and API key go along with each call of the worker."""

    request_id: str
    traceparent: str = ""
    authorization: str | None = None  # the header, as it came
    usage: KeyUsage | None = None  # of its API key, if keys are asked for here
    status: int = CLIENT_GONE  # what was sent, or what a stream ended with

    @classmethod
    def of(cls, headers: Headers) -> Caller:
        """A request id that is unfit is replaced, not refused: nothing depends on it but logs."""
        given = headers.get(origin.REQUEST_ID, "")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        traceparent = headers.get(origin.TRACEPARENT, "")
        if not origin.is_traceparent(traceparent):
            traceparent = ""
        return cls(name, traceparent, headers.get("authorization"))

    @property
    def api_key(self) -> str | None:
        """To be shown to the worker."""
        scheme, _, key = (self.authorization or "").partition(" ")
        return key.strip() if scheme.lower() == "bearer" else None
