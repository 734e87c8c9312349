"""What is told of one request: distributions, a count by outcome, one line in the log, and its spans.

A watch sees what the request's jobs emit, on the engine's thread, and how the call ends, on the event loop.
It changes nothing of either. Not done here: ids, and what becomes of an error (`common.grpc_server`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from types import TracebackType
from typing import Any

from common import origin, tracing
from common.errors import (
    DeadlineExceeded,
    Exhausted,
    Incompatible,
    InvalidRequest,
    PermissionDenied,
    Unavailable,
)
from common.logs import fields, printable
from common.origin import Origin
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.jobs import Generation, Scoring
from gpu_worker.lifecycle import NotAccepting
from gpu_worker.metrics import WorkerMetrics

log = logging.getLogger(__name__)

FINISHED, CANCELLED, DEADLINE = "finished", "cancelled", "deadline"
INVALID, REFUSED, FAILED = "invalid", "refused", "failed"  # by the caller's fault, for want of room, by ours
_CLOCKS_APART = 0.05  # seconds; the client's limit begins before the request arrives here
Told = dict[str, str | int | float]
OUTCOMES = (FINISHED, CANCELLED, DEADLINE, INVALID, REFUSED, FAILED)


def outcome_of(error: BaseException | None) -> str:
    """How a call that ended so has ended."""
    if error is None:
        return FINISHED
    if isinstance(error, DeadlineExceeded):
        return DEADLINE
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return CANCELLED
    if isinstance(error, (InvalidRequest, Incompatible, PermissionDenied)):
        return INVALID
    return REFUSED if isinstance(error, (Exhausted, NotAccepting)) else FAILED


class RequestWatch:
    """A context of the whole call: entered when it arrives, left at its one end. What the task does from then
    on is for its span."""

    def __init__(self, metrics: WorkerMetrics, kind: str, time_limit: float | None = None) -> None:
        """`kind` is generate or score; whose request it is, the task knows. `time_limit`: its client's, in
        seconds; gRPC cancels a call for it just as if the client had gone away."""
        self._time_limit = math.inf if time_limit is None else time_limit
        self._accepted = False
        self._prompt_tokens = 0
        self._metrics, self._kind, self._caller = metrics, kind, origin.current()
        self._request_id = ",".join(self._caller.requests)
        self._arrived = self._queued = time.monotonic()  # the second: as the scheduler has it
        named = _attributes({"request_id": self._request_id})
        self._span = tracing.span(f"worker {kind}", self._caller.traceparent, named)
        self._tokens = 0
        self._first_token: float | None = None  # seconds since arrival
        self._last_token: dict[int, float] = {}  # by continuation
        self._finishes: list[pb.Finish] = []

    def __enter__(self) -> RequestWatch:
        origin.work_for(Origin(self._caller.requests, self._span.traceparent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome, seconds = outcome_of(error), time.monotonic() - self._arrived
        if isinstance(error, Unavailable) and outcome == FAILED and not self._accepted:
            outcome = REFUSED  # starting or draining
        if outcome == CANCELLED and seconds > self._time_limit - _CLOCKS_APART:
            outcome = DEADLINE
        self._metrics.requests.labels(self._kind, outcome).inc()
        self._metrics.duration.labels(self._kind).observe(seconds)
        told = self._told(outcome, seconds) | ({"error": str(error)} if str(error or "") else {})
        level = logging.WARNING if outcome == FAILED else logging.INFO
        log.log(level, "%s", _line(told), extra=fields(**told))
        self._span.end("" if outcome == FINISHED else outcome, _attributes(told))

    def follow(self, job: Generation | Scoring) -> None:
        """From now on see what it emits."""
        emit = job.emit
        self._accepted, self._queued = True, job.arrived
        self._prompt_tokens = len(job.prompt if isinstance(job, Generation) else job.tokens)

        def seen(message: Any) -> None:
            if isinstance(message, pb.GenerateEvent):
                self._see(message)
            elif message.HasField("piece"):
                self._see_scores(len(message.piece.logprobs))
            emit(message)

        job.emit = seen

    def _see(self, event: pb.GenerateEvent) -> None:
        if event.HasField("finish"):
            self._see_finish(event.finish, event.index)
        elif count := len(event.delta.tokens):
            now, before = time.monotonic(), self._last_token.get(event.index)
            if before is not None:
                self._metrics.inter_token.observe((now - before) / count)
            elif self._first_token is None:
                self._first_token = now - self._arrived
                self._metrics.first_token.observe(self._first_token)
                self._metrics.prompt_tokens += self._prompt_tokens
            self._last_token[event.index] = now
            self._tokens += count
            self._metrics.completion_tokens += count

    def _see_scores(self, count: int) -> None:
        if self._first_token is None:  # the first token of a text has no score
            self._first_token = time.monotonic() - self._arrived
            self._metrics.prompt_tokens += 1
        self._metrics.prompt_tokens += count

    def _see_finish(self, finish: pb.Finish, index: int) -> None:
        end, timings = time.monotonic(), finish.timings
        if not self._finishes:  # the prompt is read once for all continuations, any of which may end first
            begun = self._queued + timings.queue_ms / 1e3
            self._metrics.queue.observe(timings.queue_ms / 1e3)
            self._span.child("queue", self._queued, begun)
            self._span.child("prefill", begun, begun + timings.prefill_ms / 1e3)
        told: Told = {"index": index, "reason": finish.reason, "fetch_seconds": finish.cache.fetch_seconds}
        self._span.child("decode", end - timings.decode_ms / 1e3, end, _attributes(told))
        self._finishes.append(finish)

    def _told(self, outcome: str, seconds: float) -> Told:
        """For the log and the span; what is not known is left out."""
        told: Told = {
            "request_id": self._request_id,
            "kind": self._kind,
            "outcome": outcome,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "duration_seconds": round(seconds, 6),
        }
        if self._first_token is not None:
            told["first_token_seconds"] = round(self._first_token, 6)
        if self._finishes:
            first = self._finishes[0]
            told |= {
                "reason": ",".join(dict.fromkeys(finish.reason for finish in self._finishes)),
                "cached_prompt_tokens": first.usage.cached_prompt_tokens,
                "queue_seconds": round(first.timings.queue_ms / 1e3, 6),
                "prefill_seconds": round(first.timings.prefill_ms / 1e3, 6),
                "tokens_per_second": round(first.timings.tokens_per_second, 2),
                "hit_rate": round(first.cache.hit_rate, 4),
            }
        return told


def _attributes(told: Told) -> Told:
    """Of a span."""
    return {f"expert_serving.{name}": value for name, value in told.items()}


def _line(told: Told) -> str:
    """For people."""
    how = (
        f" ({told['reason']})"
        if "reason" in told
        else f": {printable(str(told['error']))}"
        if "error" in told
        else ""
    )
    parts = [
        f"{told['kind']} {told['outcome']}{how}",
        f"{told['prompt_tokens']} + {told['completion_tokens']} tokens in {told['duration_seconds']:.3f} s",
    ]
    if "first_token_seconds" in told:
        parts.append(f"the first after {told['first_token_seconds']:.3f} s")
    if "hit_rate" in told:
        parts.append(f"{told['tokens_per_second']:.1f} tokens/s, {told['hit_rate']:.0%} hits")
    return ", ".join(parts)
