"""The page of metrics, over HTTP, as Prometheus' own parser reads it."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from common import metrics
from common.addresses import Address
from common.errors import ConfigError
from common.metrics import MetricsPage, counter, gauge, new_registry, seconds


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
    start = metrics._start_http_server
    monkeypatch.setattr(metrics, "_start_http_server", lambda port, host, registry: start(0, host, registry))


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


@pytest.mark.parametrize("version", ["1.x", "", "1.0.0.0", "\u00b2"])
@pytest.mark.parametrize("kind", ["text/plain", "application/openmetrics-text"])
def test_a_form_that_nobody_knows_is_the_plain_one(kind: str, version: str) -> None:
    registry = new_registry(lambda: [gauge("worker_b", "B.", 2)])
    page, content_type = metrics.exposition(registry, f"{kind};version={version}")
    assert b"expert_serving_worker_b 2.0" in page and content_type
