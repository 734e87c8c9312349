"""What is told of one demand: a line in the log, and a span in the trace of the request that waits for it.

A demand that finds its expert in a frame is told of by the counters alone.
"""

from __future__ import annotations

import logging
import time

from common import origin, tracing
from common.messages import Failed, Reply, Request

log = logging.getLogger(__name__)


class StageWatch:
    """From the demand to its reply; `ready` says that there is nothing to wait for."""

    def __init__(self, request: Request, ready: bool) -> None:
        self._request, self._ready, self._started = request, ready, time.monotonic()
        self._span = tracing.Span()
        if request.origin.traceparent and not ready:
            key = request.keys[0]
            named: tracing.Attributes = {
                "expert_serving.request_id": ",".join(request.origin.requests),
                "expert_serving.layer": key.layer,
                "expert_serving.expert": key.expert,
            }
            self._span = tracing.span("store stage", request.origin.traceparent, named)

    def end(self, reply: Reply) -> None:
        milliseconds = 1e3 * (time.monotonic() - self._started)
        with origin.working_for(self._request.origin):
            if isinstance(reply, Failed):
                log.warning("a demand failed after %.0f ms: %s", milliseconds, reply.text)
            elif not self._ready:
                key = self._request.keys[0]
                log.debug("staged expert %d of layer %d in %.1f ms", key.expert, key.layer, milliseconds)
        self._span.end(reply.text if isinstance(reply, Failed) else "")
