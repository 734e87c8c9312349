"""What a watch tells of a request that it saw, and of one that never had a token."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from common import origin, tracing
from common.errors import DeadlineExceeded, Exhausted, InvalidRequest, PermissionDenied, Unavailable
from common.origin import Origin
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.jobs import Emit, Generation, Scoring
from gpu_worker.metrics import WorkerMetrics
from gpu_worker.request_watch import OUTCOMES, RequestWatch, outcome_of
from gpu_worker.sampling import SamplingParams

TOKEN = pb.GenerateEvent(delta=pb.Delta(text="a", tokens=[pb.Token(id=1)]))
TEXT = pb.GenerateEvent(delta=pb.Delta(text="rest"))
FINISH = pb.GenerateEvent(
    finish=pb.Finish(
        reason="eos",
        usage=pb.Usage(prompt_tokens=7, completion_tokens=2, cached_prompt_tokens=4),
        timings=pb.Timings(queue_ms=20, prefill_ms=30, decode_ms=50, tokens_per_second=40),
        cache=pb.CacheCounters(hits=3, misses=1, hit_rate=0.75, fetch_seconds=0.01),
    )
)
PREFIX = "expert_serving_worker_"


def generation(emit: Emit = lambda message: None) -> Generation:
    return Generation(range(7), SamplingParams(), (), None, emit)


@pytest.fixture
def metrics() -> WorkerMetrics:
    return WorkerMetrics(list)


@pytest.fixture(autouse=True)
def asked_by_somebody() -> Iterator[None]:
    with origin.working_for(Origin(("abc",))):
        yield


def value(metrics: WorkerMetrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(PREFIX + name, labels) or 0.0


def test_tokens_and_ending_become_distributions_one_line_and_a_count(
    metrics: WorkerMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    seen: list[Any] = []
    with RequestWatch(metrics, "generate") as watch:
        job = generation(seen.append)
        watch.follow(job)
        for event in (TOKEN, TOKEN, TEXT, FINISH):
            job.emit(event)
    assert (metrics.prompt_tokens, metrics.completion_tokens) == (7, 2)
    assert seen == [TOKEN, TOKEN, TEXT, FINISH]
    assert value(metrics, "requests_total", kind="generate", outcome="finished") == 1
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "inter_token_latency_seconds_count") == 1, "text alone is no token"
    assert value(metrics, "queue_seconds_sum") == pytest.approx(0.02)
    assert value(metrics, "request_duration_seconds_count", kind="generate") == 1
    (record,) = caplog.records
    assert record.levelname == "INFO" and "generate finished (eos), 7 + 2 tokens" in record.getMessage()
    told = record.fields  # type: ignore[attr-defined]
    assert (told["request_id"], told["hit_rate"], told["cached_prompt_tokens"]) == ("abc", 0.75, 4)
    assert told["first_token_seconds"] <= told["duration_seconds"]


def test_samples_have_their_own_latencies_and_one_first_token(metrics: WorkerMetrics) -> None:
    with RequestWatch(metrics, "generate") as watch:
        job = generation()
        watch.follow(job)
        for index in (0, 1, 1, 0, 0):
            job.emit(pb.GenerateEvent(delta=pb.Delta(tokens=[pb.Token(id=1)]), index=index))
        for index in (0, 1):
            job.emit(pb.GenerateEvent(finish=pb.Finish(reason="length"), index=index))
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "inter_token_latency_seconds_count") == 3
    assert value(metrics, "queue_seconds_count") == 1
    assert (metrics.prompt_tokens, metrics.completion_tokens) == (7, 5)


def test_a_text_counts_as_read_as_far_as_it_is_scored(metrics: WorkerMetrics) -> None:
    with RequestWatch(metrics, "score") as watch:
        job = Scoring(range(100), 50, 50, lambda message: None)
        watch.follow(job)
        for count in (20, 9):
            job.emit(pb.ScoreEvent(piece=pb.ScorePiece(logprobs=[0.0] * count)))
    assert (metrics.prompt_tokens, metrics.completion_tokens) == (30, 0)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "finished"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
        (DeadlineExceeded("late"), "deadline"),
        (InvalidRequest("wrong"), "invalid"),
        (PermissionDenied("not with this key"), "invalid"),
        (Exhausted("full"), "refused"),
        (Unavailable("gone"), "failed"),
        (AssertionError("bug"), "failed"),
    ],
)
def test_every_ending_has_an_outcome(
    error: BaseException | None, outcome: str, metrics: WorkerMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert outcome_of(error) == outcome and outcome in OUTCOMES
    with suppress(BaseException), RequestWatch(metrics, "score") as watch:
        watch.follow(generation())
        if error is not None:
            raise error
    assert value(metrics, "requests_total", kind="score", outcome=outcome) == 1
    assert f"score {outcome}" in caplog.text and (str(error or "") in caplog.text)


def test_the_line_of_a_text_log_has_no_others_lines(
    metrics: WorkerMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with suppress(InvalidRequest), RequestWatch(metrics, "generate"):
        raise InvalidRequest("no role 'a\n\x1b[2J'")
    (record,) = caplog.records
    assert record.getMessage().startswith("generate invalid: no role 'a\\n\\x1b[2J', 0 + 0 tokens")
    assert record.fields["error"] == "no role 'a\n\x1b[2J'"  # type: ignore[attr-defined] # JSON can say it


def test_a_request_that_comes_while_draining_is_refused_and_has_not_failed(metrics: WorkerMetrics) -> None:
    with suppress(Unavailable), RequestWatch(metrics, "generate"):
        raise Unavailable("the worker is draining")
    assert value(metrics, "requests_total", kind="generate", outcome="refused") == 1


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield exporter
    tracing.stop()


def test_spans_are_of_the_callers_trace_and_the_work_is_for_them(
    metrics: WorkerMetrics, exporter: InMemorySpanExporter
) -> None:
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with origin.working_for(Origin(("abc",), caller)), RequestWatch(metrics, "generate") as watch:
        job = generation()
        job.arrived -= 0.1  # what it tells took 100 ms
        watch.follow(job)
        job.emit(FINISH)
        inside = origin.current()
    *parts, whole = exporter.get_finished_spans()
    assert [part.name for part in parts] == ["queue", "prefill", "decode"]
    assert whole.name == "worker generate" and whole.context is not None
    assert f"{whole.context.span_id:016x}" in inside.traceparent and inside.requests == ("abc",)
    assert all(part.parent == whole.context for part in parts)
    assert milliseconds(parts) == pytest.approx([20, 30, 50], abs=0.01)
    assert parts[0].end_time == parts[1].start_time
    assert (whole.attributes or {})["expert_serving.outcome"] == "finished"


def test_the_prompts_spans_do_not_depend_on_which_sample_ends_first(
    metrics: WorkerMetrics, exporter: InMemorySpanExporter
) -> None:
    """Their times were reckoned from the begin of the first that ended once, which may be a late one's."""
    with RequestWatch(metrics, "generate") as watch:
        job = generation()
        job.arrived -= 1.0
        watch.follow(job)
        for index, decode_ms in ((1, 200), (0, 950)):
            event = pb.GenerateEvent(index=index)
            event.CopyFrom(FINISH)
            event.index, event.finish.timings.decode_ms = index, decode_ms
            job.emit(event)
    queue, prefill, later, first, _ = spans = exporter.get_finished_spans()
    assert milliseconds(spans[:4]) == pytest.approx([20, 30, 200, 950], abs=0.01)
    assert queue.end_time == prefill.start_time
    assert milliseconds([prefill], since=queue.start_time) == pytest.approx([50], abs=0.01)
    assert abs(prefill.end_time - first.start_time) < 50e6 < later.start_time - prefill.end_time


def milliseconds(spans: Sequence[Any], since: int | None = None) -> list[float]:
    """Of each, or from `since` to its end."""
    return [(span.end_time - (since or span.start_time)) / 1e6 for span in spans]
