"""Spans: nothing where tracing is off, and what OpenTelemetry's own exporter got where it is on."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from common import tracing

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exported() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield exporter
    tracing.stop()


def test_a_span_is_the_callers_child_and_has_children_of_its_own(exported: InMemorySpanExporter) -> None:
    started, now = time.time(), time.monotonic()
    span = tracing.span("request", CALLER, {"id": "a"})
    span.child("queue", now - 2, now - 1, {"n": 1})
    span.end("failed", {"tokens": 3})
    queue, request = exported.get_finished_spans()
    assert request.parent is not None and request.context is not None
    assert request.parent.span_id == int(CALLER.split("-")[2], 16) and request.parent.is_remote
    assert request.context.trace_id == int(CALLER.split("-")[1], 16)
    assert span.traceparent == f"00-{request.context.trace_id:032x}-{request.context.span_id:016x}-01"
    assert dict(request.attributes or {}) == {"id": "a", "tokens": 3}
    assert request.status.status_code is StatusCode.ERROR and request.status.description == "failed"
    assert queue.parent == request.context and dict(queue.attributes or {}) == {"n": 1}
    assert queue.start_time is not None and queue.end_time is not None
    assert abs(queue.start_time / 1e9 - (started - 2)) < 0.5
    assert abs((queue.end_time - queue.start_time) / 1e9 - 1) < 1e-3


def test_nobodys_child_begins_a_trace(exported: InMemorySpanExporter) -> None:
    for traceparent in ("", "nonsense", CALLER.upper()):
        span = tracing.span("request", traceparent)
        span.end()
        assert exported.get_finished_spans()[-1].parent is None
        assert span.traceparent.startswith("00-") and CALLER[3:35] not in span.traceparent


def test_off_it_passes_on_what_the_caller_said() -> None:
    span = tracing.span("request", CALLER)
    span.child("queue", 0, 1)
    span.end()
    assert span.traceparent == CALLER
    assert tracing.span("request", "x y").traceparent == ""


@pytest.mark.parametrize(
    ("environment", "exporters"),
    [
        ({}, []),
        ({"OTEL_TRACES_EXPORTER": "console"}, ["console"]),
        ({"OTEL_TRACES_EXPORTER": "otlp, console"}, ["otlp_proto_http", "console"]),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, ["otlp_proto_http"]),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ["otlp_proto_grpc"]),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, []),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "TRUE"}, []),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": ""}, ["otlp_proto_http"]),
    ],
)
def test_the_environment_switches_it_on(
    environment: dict[str, str], exporters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracing._exporters_named() == exporters


def test_an_exporter_that_is_not_there_is_told_and_nothing_is_traced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "nowhere")
    tracing.start("test")
    assert "nothing is traced to nowhere" in caplog.text
    assert type(tracing.span("request")) is tracing.Span


PROGRAM = """
import sys
from common import tracing
tracing.start("test")
tracing.span("request").end()
tracing.stop()
print("opentelemetry" in sys.modules)
"""


@pytest.mark.parametrize("on", [False, True])
def test_off_it_imports_nothing_and_on_it_tells_everything(on: bool) -> None:
    environment = {"OTEL_TRACES_EXPORTER": "console"} if on else {}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str(on)
    assert ('"name": "request"' in done.stdout) == on
    assert ('"service.name": "test"' in done.stdout) == on


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "test"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "a=b,service.name=ours"}, "ours"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=ours", "OTEL_SERVICE_NAME": "mine"}, "mine"),
    ],
)
def test_the_environment_names_the_service(
    environment: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in (environment | {"OTEL_TRACES_EXPORTER": "console"}).items():
        monkeypatch.setenv(variable, value)
    with tracing.exporting("test"):
        assert tracing._provider is not None
        assert tracing._provider.resource.attributes["service.name"] == name
