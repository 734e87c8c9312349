"""The page of metrics, over HTTP, as Prometheus' own parser reads it."""

from __future__ import annotations

import asyncio
import http.client
import socket
import struct
import threading
import urllib.request
from collections.abc import Iterable, Iterator

import pytest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from common import metrics
from common.addresses import Address
from common.errors import ConfigError
from common.metrics import MetricsPage, counter, gauge, new_registry, seconds
from tests.helpers.metrics_pages import registries


def page(registry: object, path: str = "/metrics") -> dict[str, Metric]:
    served = MetricsPage(Address.parse("127.0.0.1:1"), registry)  # type: ignore[arg-type]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}{path}", timeout=10) as reply:
            return {family.name: family for family in text_string_to_metric_families(reply.read().decode())}
    finally:
        served.close()


@pytest.fixture(autouse=True)
def any_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses name a port; tests must not."""
    server = metrics._PageServer
    monkeypatch.setattr(metrics, "_PageServer", lambda host, port, registry: server(host, 0, registry))


def test_the_page_has_figures_distributions_and_the_process() -> None:
    value = 1.0
    registry = new_registry(lambda: [counter("worker_a", "A.", value), gauge("worker_b", "B.", 2)])
    seconds(registry, "worker_c", "C.").observe(0.02)
    families = page(registry)
    assert families["expert_serving_worker_a"].samples[0].value == 1.0
    assert families["expert_serving_worker_b"].type == "gauge"
    buckets = {
        s.labels["le"]: s.value for s in families["expert_serving_worker_c_seconds"].samples if s.labels
    }
    assert buckets["0.01"] == 0 and buckets["0.025"] == 1
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6
    assert not any(name.endswith("_created") for name in families)
    value = 5.0
    assert page(registry)["expert_serving_worker_a"].samples[0].value == 5.0, "read when somebody looks"


def test_figures_that_do_not_come_leave_the_rest_of_the_page(caplog: pytest.LogCaptureFixture) -> None:
    def late() -> Iterable[Metric]:
        raise TimeoutError("the loop is busy")

    registry = new_registry(late)
    seconds(registry, "worker_c", "C.")
    assert "expert_serving_worker_c_seconds" in page(registry)
    assert "lacks" in caplog.text and "the loop is busy" in caplog.text


def test_an_address_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = new_registry(list)
    first = MetricsPage(Address.parse("127.0.0.1:1"), registry)
    monkeypatch.undo()
    try:
        with pytest.raises(ConfigError, match=rf"--metrics 127.0.0.1:{first.port}: cannot listen"):
            MetricsPage(Address.parse(f"127.0.0.1:{first.port}"), registry)
    finally:
        first.close()


@pytest.fixture
def served() -> Iterator[MetricsPage]:
    registry = new_registry(lambda: [gauge("worker_b", "B.", 2)])
    seconds(registry, "worker_c", "C.").observe(0.02)
    page = MetricsPage(Address.parse("127.0.0.1:1"), registry)
    yield page
    page.close()


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (None, "text/plain"),
        ("", "text/plain"),
        ("*/*", "text/plain"),
        (",;=,", "text/plain"),
        ("\xff\xb2", "text/plain"),
        ("x" * 60_000, "text/plain"),
        ("text/plain;version=1.x", "text/plain"),
        ("application/openmetrics-text;version=\xb2", "text/plain"),
        ("application/openmetrics-text;version=x, text/plain", "text/plain"),
        ("application/openmetrics-text", "application/openmetrics-text"),
        ("application/openmetrics-text;version=1.0.0;q=0.5", "application/openmetrics-text"),
    ],
)
def test_whatever_form_is_accepted_there_is_a_page(
    served: MetricsPage, accept: str | None, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Some of these were an error once, with a traceback among the logs."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    connection.putrequest("GET", "/metrics")
    if accept is not None:
        connection.putheader("Accept", accept.encode("latin-1"))
    connection.endheaders()
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    assert (reply.status, reply.headers.get_content_type()) == (200, form)
    assert "expert_serving_worker_b 2.0" in text and text.endswith("# EOF\n") == (form != "text/plain")
    parse = openmetrics if form != "text/plain" else text_string_to_metric_families
    assert "expert_serving_worker_c_seconds" in {family.name for family in parse(text)}
    assert capfd.readouterr().err == ""


def test_all_processes_pages_are_open_metrics_too() -> None:
    for registry in registries():
        page, _ = metrics.exposition(registry, "application/openmetrics-text;version=1.0.0")
        families = {family.name for family in openmetrics(page.decode())}
        assert families == {family.name for family in registry.collect()}


def test_clients_that_break_off_or_send_no_http_are_not_in_the_logs(
    served: MetricsPage, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for sent in (b"GET ", b"\x00\xff\r\n\r\n", b"POST / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:
            raw.sendall(sent)
            assert sent == b"GET " or raw.recv(1 << 16)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    assert urllib.request.urlopen(f"http://127.0.0.1:{served.port}/", timeout=10).status == 200
    assert capfd.readouterr().err == "" and not caplog.records


def test_a_client_that_asks_for_nothing_is_let_go(
    monkeypatch: pytest.MonkeyPatch, served: MetricsPage
) -> None:
    assert metrics._PageHandler.timeout is not None
    monkeypatch.setattr(metrics._PageHandler, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:
        assert raw.recv(1) == b""


def test_a_process_that_ends_meanwhile_leaves_the_rest_of_the_page() -> None:
    reading, got = threading.Event(), []

    async def read() -> list[Metric]:
        reading.set()
        await asyncio.Event().wait()
        return []

    async def process() -> threading.Thread:
        figures = metrics.read_on_loop(read)
        page = threading.Thread(target=lambda: got.append(figures()))
        page.start()
        await asyncio.to_thread(reading.wait)
        return page

    asyncio.run(process()).join(10)
    assert got == [[]]


def test_a_page_that_cannot_be_made_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Iterable[Metric]:
        raise AssertionError("a bug")

    registry = new_registry(list)
    broken_page = MetricsPage(Address.parse("127.0.0.1:1"), registry)
    registry.register(metrics._Figures(broken))
    with pytest.raises(http.client.RemoteDisconnected):
        urllib.request.urlopen(f"http://127.0.0.1:{broken_page.port}/", timeout=10)
    broken_page.close()
    assert "a bug" in caplog.text


@pytest.mark.parametrize("version", ["1.x", "", "1.0.0.0", "\u00b2"])
@pytest.mark.parametrize("kind", ["text/plain", "application/openmetrics-text"])
def test_a_form_that_nobody_knows_is_the_plain_one(kind: str, version: str) -> None:
    registry = new_registry(lambda: [gauge("worker_b", "B.", 2)])
    page, content_type = metrics.exposition(registry, f"{kind};version={version}")
    assert b"expert_serving_worker_b 2.0" in page and content_type
