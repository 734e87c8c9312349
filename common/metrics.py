"""What the processes have in common of their Prometheus metrics: the registry, its page, names and buckets.

Counts are kept where the work is done. A collector makes metrics of them when somebody looks: `Figures` of a
process is a function that returns families, run where its counts may be read. Only distributions, which
nobody else keeps, are histograms of the registry itself. Names: `expert_serving_PROCESS_WHAT_UNIT`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from common.addresses import Address
from common.errors import ConfigError

log = logging.getLogger(__name__)

_READ_TIMEOUT = 5.0  # seconds; Prometheus itself waits for ten
_IDLE_TIMEOUT = 30.0  # seconds that a client may take to ask for the page
PREFIX = "expert_serving"
# From a tenth of a millisecond, which a small model takes for a token, to what a long prompt takes on a CPU.
SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
    0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300,
)  # fmt: skip

Figures = Callable[[], Iterable[Metric]]


def new_registry(figures: Figures) -> CollectorRegistry:
    """A registry of one process: its own figures, and what the system knows of it (memory, CPU, files)."""
    disable_created_metrics()
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Figures(figures))
    return registry


def seconds(registry: CollectorRegistry, name: str, text: str, labels: Iterable[str] = ()) -> Histogram:
    """A distribution of times; `name` without prefix and unit."""
    full = f"{PREFIX}_{name}_seconds"
    return Histogram(full, text, labelnames=tuple(labels), registry=registry, buckets=SECONDS)


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    """`name` without `_total`, which is added."""
    return CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)


def counters_by(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
    """One counter for each value of a label."""
    family = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=[label])
    for value, count in values:
        family.add_metric([value], count)
    return family


def info(name: str, text: str, values: dict[str, str]) -> Metric:
    """What does not change, as labels of a metric that is 1."""
    return InfoMetricFamily(f"{PREFIX}_{name}", text, value=values)


def exposition(registry: CollectorRegistry, accept: str | None = None) -> tuple[bytes, str]:
    """The page as bytes, and its content type; `accept` is the HTTP header of who asks."""
    try:
        encode, content_type = choose_encoder(accept or "")
    except (TypeError, ValueError):  # what it makes of a version that is none
        encode, content_type = choose_encoder("")
    return encode(registry), content_type


class _Figures(Collector):
    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def describe(self) -> list[Metric]:
        """Nothing is known before the first collection."""
        return []

    def collect(self) -> Iterable[Metric]:
        try:
            return list(self._figures())
        except TimeoutError as error:  # the rest of the page is worth having; what is absent can be seen
            log.warning("the metrics page lacks this process's own figures: %s", error)
            return []


def read_on_loop(read: Callable[[], Coroutine[Any, Any, list[Metric]]]) -> Figures:
    """Figures for a page, whose threads may not read what belongs to the running event loop."""
    loop = asyncio.get_running_loop()

    def figures() -> list[Metric]:
        if loop.is_closed():
            return []
        reading = asyncio.run_coroutine_threadsafe(read(), loop)
        try:
            return reading.result(_READ_TIMEOUT)
        except FutureTimeoutError:
            reading.cancel()
            raise TimeoutError(f"they could not be read within {_READ_TIMEOUT:g} s") from None
        except FutureCancelledError:  # the loop has ended meanwhile
            return []

    return figures


class _PageServer(ThreadingHTTPServer):
    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.registry = registry
        super().__init__((host, port), _PageHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """By default there would be a traceback among the logs for each client that breaks off."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("the metrics page could not be made")


class _PageHandler(BaseHTTPRequestHandler):
    """Any path is the page's. prometheus_client's own server answers some Accept headers with a traceback."""

    server: _PageServer
    timeout = _IDLE_TIMEOUT

    def do_GET(self) -> None:
        page, content_type = exposition(self.server.registry, self.headers.get("accept"))
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the page is asked for every few seconds."""


class MetricsPage:
    """Serves a registry over HTTP, from threads of its own. Owns its socket."""

    def __init__(self, address: Address, registry: CollectorRegistry) -> None:
        """Raises ConfigError when nobody can listen there."""
        host, _, port = address.target.rpartition(":")
        try:
            self._server = _PageServer(host.strip("[]"), int(port), registry)
        except OSError as error:
            raise ConfigError(f"--metrics {address}: cannot listen there: {error.strerror}") from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
