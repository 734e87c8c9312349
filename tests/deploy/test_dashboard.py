"""The Grafana dashboard asks for metrics that there are, and the metrics are named as Prometheus wants it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import Metric

from common.rpc import expert_store_pb2 as store_pb
from common.rpc import gpu_worker_pb2 as pb
from expert_store import metrics as store_metrics
from gpu_worker import metrics as worker_metrics
from tests.helpers.metrics_pages import Families, everything_exported, lint

DASHBOARD = Path(__file__).parents[2] / "deploy/grafana/expert-serving.json"
Figures = Callable[[Any], Iterable[Metric]]
_NAME = re.compile(r"\b(?:expert_serving|process)_[a-z_]+")


@pytest.fixture(scope="module")
def families() -> Families:
    return everything_exported()


@pytest.fixture(scope="module")
def panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return panels


def expressions(panels: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for panel in panels:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def sample_names(families: Families) -> set[str]:
    """As queries name them, with what histograms make of their names."""
    plain = {sample.name for family in families.values() for sample in family.samples}
    histograms = {name for name, family in families.items() if family.type == "histogram"}
    # Counters with labels have no samples before the first event.
    unseen = {f"{name}_total" for name, family in families.items() if family.type == "counter"}
    return plain | unseen | {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}


def test_every_query_is_of_a_metric_that_is_exported(
    families: Families, panels: list[dict[str, Any]]
) -> None:
    known, asked = sample_names(families), list(expressions(panels))
    assert len(asked) > 40
    for title, expression in asked:
        names = _NAME.findall(expression)
        assert names, f"{title}: {expression}"
        assert set(names) <= known, f"{title} asks for {set(names) - known}"


def test_rates_are_of_counters_and_labels_are_those_there_are(
    families: Families, panels: list[dict[str, Any]]
) -> None:
    labels = {label for family in families.values() for sample in family.samples for label in sample.labels}
    labels |= {"outcome", "status", "route", "instance", "job"}
    for title, expression in expressions(panels):
        for name in re.findall(r"rate\((\w+)", expression):
            assert name.endswith(("_total", "_bucket")), f"{title} has a rate of {name}"
        for by in re.findall(r"by \(([^)]*)\)", expression):
            assert set(by.split(", ")) <= labels, f"{title} groups by {by}"
        assert expression.count("(") == expression.count(")")


def test_panels_do_not_overlap(panels: list[dict[str, Any]]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_metrics_keep_prometheus_conventions(families: Families) -> None:
    assert list(lint(families.values())) == []
    assert len(families) > 50


def test_a_worker_with_two_leases_is_one_series() -> None:
    """Prometheus refuses a page that has a series twice."""
    leases = [store_pb.LeaseInfo(worker="w", pinned_frames=count) for count in (2, 3)]
    for family in store_metrics.figures_of(store_pb.StoreStats(leases=leases)):
        series = [(sample.name, *sample.labels.items()) for sample in family.samples]
        assert len(series) == len(set(series))
        if family.name.endswith("lease_pinned_frames"):
            assert family.samples[0].value == 5


# What the page says in another way: by outcome, by the process's own metrics.
_OTHERWISE = {
    *("requests", "requests_failed", "requests_cancelled", "uptime_seconds", "resident_bytes"),
    *("vram_budget", "leases"),
}


@pytest.mark.parametrize(
    ("message", "figures_of"),
    [
        (
            pb.WorkerStats(vram_budget=1),
            lambda stats: worker_metrics.figures_of(stats, pb.ModelInfoReply()),
        ),
        (store_pb.StoreStats(layers=1, experts_per_layer=1), store_metrics.figures_of),
    ],
)
def test_every_number_of_the_statistics_is_in_the_metrics(message: Any, figures_of: Figures) -> None:
    """A counter that is added to a message must not be forgotten here."""

    def told() -> list[float]:
        return [sample.value for family in figures_of(message) for sample in family.samples]

    nothing = told()
    for field in message.DESCRIPTOR.fields:
        numeric = field.type in (field.TYPE_UINT32, field.TYPE_UINT64, field.TYPE_DOUBLE, field.TYPE_BOOL)
        if numeric and not field.is_repeated and field.name not in _OTHERWISE:
            before = getattr(message, field.name)
            setattr(message, field.name, True if field.type == field.TYPE_BOOL else 7_654_321)
            assert told() != nothing, f"{field.name} is in no metric"
            setattr(message, field.name, before)
