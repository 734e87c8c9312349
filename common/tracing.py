"""Spans of OpenTelemetry, where it is installed and switched on; else nothing, and nothing is imported.

The environment says so, as OpenTelemetry defines it: `OTEL_TRACES_EXPORTER` (otlp, console; several with
commas) or an `OTEL_EXPORTER_OTLP_ENDPOINT` switches it on, `OTEL_SDK_DISABLED=true` off; the SDK itself reads
the rest (service name, sampler, headers). A request makes some spans, and one for each expert that it waits
for the disk for; nothing that a token always does makes any. Who is asked on behalf of a span is told its
`traceparent` (`common.origin`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING

from common.origin import is_traceparent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

log = logging.getLogger(__name__)

Attributes = Mapping[str, str | int | float | bool]
_NONE: Attributes = MappingProxyType({})
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_FLUSH_TIMEOUT = 2.0  # seconds that the end of a process waits for a collector

_provider: TracerProvider | None = None
_tracer: Tracer | None = None


class Span:
    """What there is where nothing is traced: whoever sent a trace context finds it passed on."""

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent

    def child(self, name: str, start: float, end: float, attributes: Attributes = _NONE) -> None:
        """A span that is over, by the times of `time.monotonic`."""

    def end(self, error: str = "", attributes: Attributes = _NONE) -> None:
        """To be called once; `error` says what went wrong, if anything did."""


def start(service: str) -> None:
    """Switch tracing on, if the environment says so; `service` is the name, unless that has another."""
    exporters = _exporters_named()
    if not exporters:
        return
    try:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning(
            "nothing is traced: OTEL_* asks for it, but `pip install expert-serving[tracing]` was not"
        )
        return
    named = str(OTELResourceDetector().detect().attributes.get("service.name") or service)
    provider = TracerProvider(resource=Resource.create({"service.name": named}), shutdown_on_exit=False)
    for name in exporters:
        found = entry_points(group="opentelemetry_traces_exporter", name=name)
        if not found:
            log.warning("nothing is traced to %s: no such exporter of OpenTelemetry is installed", name)
            return
        provider.add_span_processor(BatchSpanProcessor(next(iter(found)).load()()))
    use(provider)
    log.info("traces go to %s as %s", ", ".join(exporters), named)


@contextmanager
def exporting(service: str) -> Iterator[None]:
    """The block is the life of a process."""
    start(service)
    try:
        yield
    finally:
        stop()


def use(provider: TracerProvider) -> None:
    """Have spans made by `provider` from now on."""
    global _provider, _tracer
    _provider, _tracer = provider, provider.get_tracer("expert_serving")


def stop() -> None:
    """Send what has not been sent; a collector that does not answer is not waited for long."""
    global _provider, _tracer
    if _provider is not None:
        # In a thread: the exporter retries for longer than the time limits that the SDK takes.
        closing = threading.Thread(target=_provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(_FLUSH_TIMEOUT)
    _provider = _tracer = None


def span(name: str, traceparent: str = "", attributes: Attributes = _NONE) -> Span:
    """A span that begins now; a child of what `traceparent` names, if it names any."""
    if not is_traceparent(traceparent):
        traceparent = ""
    return Span(traceparent) if _tracer is None else _RecordedSpan(_tracer, name, traceparent, attributes)


class _RecordedSpan(Span):
    def __init__(self, tracer: Tracer, name: str, traceparent: str, attributes: Attributes) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Epoch's clock may jump; all times of one span have one distance from the monotonic one.
        self._epoch = time.time() - time.monotonic()
        self._tracer, propagator = tracer, TraceContextTextMapPropagator()
        self._span = tracer.start_span(
            name,
            context=propagator.extract({"traceparent": traceparent}),
            kind=SpanKind.SERVER,
            attributes=dict(attributes),
            start_time=self._nanoseconds(time.monotonic()),
        )
        self._context = set_span_in_context(self._span)
        carrier: dict[str, str] = {}
        propagator.inject(carrier, self._context)
        super().__init__(carrier["traceparent"])

    def child(self, name: str, start: float, end: float, attributes: Attributes = _NONE) -> None:
        child = self._tracer.start_span(
            name, context=self._context, attributes=dict(attributes), start_time=self._nanoseconds(start)
        )
        child.end(self._nanoseconds(end))

    def end(self, error: str = "", attributes: Attributes = _NONE) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_attributes(dict(attributes))
        if error:
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end(self._nanoseconds(time.monotonic()))

    def _nanoseconds(self, monotonic: float) -> int:
        return int((self._epoch + monotonic) * 1e9)


def _exporters_named() -> list[str]:
    """By the entry points' names; none where tracing is off."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    default = "otlp" if any(os.environ.get(name) for name in _ENDPOINTS) else "none"
    names = [name.strip() for name in (os.environ.get("OTEL_TRACES_EXPORTER") or default).split(",")]
    protocol = next(filter(None, map(os.environ.get, _PROTOCOLS)), "http/protobuf")
    otlp = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    return [otlp if name == "otlp" else name for name in names if name not in ("", "none")]
