"""Metrics pages as Prometheus sees them, and what its linter would say of them."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from common.metrics import exposition, new_registry
from common.rpc import expert_store_pb2 as store_pb
from common.rpc import gpu_worker_pb2 as pb
from expert_store.metrics import figures_of as store_figures
from gpu_worker.gateway.metrics import GatewayMetrics
from gpu_worker.metrics import WorkerMetrics
from gpu_worker.metrics import figures_of as worker_figures

Families = dict[str, Metric]
_NOT_BASE_UNITS = re.compile(r"_(ms|milliseconds|minutes|hours|kb|mb|gb|kilobytes|megabytes|percent)(_|$)")


def parsed(text: str) -> Families:
    return {family.name: family for family in text_string_to_metric_families(text)}


def of_registry(registry: CollectorRegistry) -> Families:
    return parsed(exposition(registry)[0].decode())


def of_page(port: int) -> Families:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        assert reply.headers["content-type"].startswith("text/plain")
        return parsed(reply.read().decode())


def values(families: Families, name: str, label: str = "") -> dict[str, float]:
    """Of one family, by one of its labels."""
    samples = families[f"expert_serving_{name}"].samples
    return {sample.labels.get(label, ""): sample.value for sample in samples}


def value(families: Families, name: str) -> float:
    (only,) = values(families, name).values()
    return only


def lint(families: Iterable[Metric]) -> Iterator[str]:
    """What breaks the conventions of prometheus.io/docs/practices/naming."""
    for family in families:
        name = family.name
        if not re.fullmatch(r"[A-Z0-9].*\.", family.documentation):
            yield f"{name} is not explained by a sentence: {family.documentation!r}"
        if family.type == "unknown":
            yield f"{name} has no type"
        if not re.fullmatch(r"(expert_serving_(worker|store|gateway)|process)_[a-z_]+[a-z]", name):
            yield f"{name} is not named like ours"
        if _NOT_BASE_UNITS.search(name):
            yield f"{name} is not in a base unit"
        for sample in family.samples:
            if (family.type == "counter") != sample.name.endswith("_total"):
                yield f"{sample.name} is a {family.type}"
            if sample.labels.keys() & {"job", "instance"}:
                yield f"{sample.name} has a label that Prometheus adds"


def everything_exported() -> Families:
    """All families of all three processes."""
    return {name: family for registry in registries() for name, family in of_registry(registry).items()}


def registries() -> list[CollectorRegistry]:
    """Of all three processes: a worker with a GPU, a gateway, and a store with a worker."""
    worker = pb.WorkerStats(vram_budget=1, layers=[pb.LayerCounters(hits=1)])
    store = store_pb.StoreStats(leases=[store_pb.LeaseInfo(worker="w")])
    return [
        WorkerMetrics(lambda: worker_figures(worker, pb.ModelInfoReply())).registry,
        GatewayMetrics(lambda: 0).registry,
        new_registry(lambda: store_figures(store)),
    ]
