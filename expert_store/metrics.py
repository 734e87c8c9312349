"""The store's metrics: what its Stats tell, as Prometheus has it, so that both say the same.

Not done here: counting (the parts that do the work), serving the page (`common.metrics`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from common.metrics import PREFIX, counter, counters_by, gauge, info
from common.rpc import expert_store_pb2 as pb


def figures_of(stats: pb.StoreStats) -> Iterator[Metric]:
    """Families of a store's counters."""
    yield info("store", "What this store serves.", {"model": stats.model, "fingerprint": stats.fingerprint})
    yield from _arena(stats)
    yield from _staging(stats)
    yield from _leases(stats)


def _arena(stats: pb.StoreStats) -> Iterator[Metric]:
    experts = stats.layers * stats.experts_per_layer
    yield gauge("store_experts", "Experts of the model.", experts)
    yield gauge("store_frames", "Places for an expert in RAM.", stats.frames)
    yield gauge("store_frames_ready", "Frames that hold one.", stats.ready_frames)
    yield gauge("store_frames_pinned", "Frames that a worker is reading.", stats.pinned_frames)
    yield gauge("store_record_bytes", "Of one expert.", stats.record_bytes)
    yield gauge("store_arena_bytes", "Of the shared segment.", stats.arena_bytes)
    yield gauge("store_arena_page_locked", "1 where the segment is locked in RAM.", stats.page_locked)
    yield counter("store_evictions", "Frames taken from an expert for another.", stats.evictions)


def _staging(stats: pb.StoreStats) -> Iterator[Metric]:
    yield counter("store_staged_records", "Experts read from disk.", stats.staged_records)
    yield counter("store_staged_bytes", "Bytes read from disk.", stats.staged_bytes)
    hinted = stats.hinted_bytes
    yield counter("store_hinted_bytes", "Of these, read because a worker expected the need.", hinted)
    seconds = (("preload", stats.preload_seconds), ("asked", stats.staging_seconds - stats.preload_seconds))
    text = "Reading, summed over the readers: before anybody asked, and since."
    yield counters_by("store_staging_seconds", text, "reason", seconds)
    yield counter("store_demands", "Experts that workers waited for.", stats.demands)
    yield counter("store_demands_ready", "Of these, in a frame when asked for.", stats.demands_ready)
    yield counter("store_hints", "Experts named in hints.", stats.hints)
    yield counter("store_refused_messages", "Data-plane requests answered by an error.", stats.refused)


def _leases(stats: pb.StoreStats) -> Iterator[Metric]:
    yield gauge("store_leases", "Workers attached.", len(stats.leases))
    pinned: Counter[str] = Counter()  # a worker that has attached again has two leases for a while
    for lease in stats.leases:
        pinned[lease.worker] += lease.pinned_frames
    family = GaugeMetricFamily(
        f"{PREFIX}_store_lease_pinned_frames", "Frames that each worker is reading.", labels=["worker"]
    )
    for worker, frames in pinned.items():
        family.add_metric([worker], frames)
    yield family
