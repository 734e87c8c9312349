"""The worker's metrics: what its Stats tell, as Prometheus has it, and the distributions that they lack.

Figures are made of the same message that `gpu-worker stats` shows, so that both say the same. Not done here:
counting (the parts that do the work), following a request (`request_watch`), serving the page
(`common.metrics`).
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Counter
from prometheus_client.core import Metric

from common.metrics import Figures, counter, counters_by, gauge, info, new_registry, seconds
from common.rpc import gpu_worker_pb2 as pb

_KIND = "kind"  # generate | score


class WorkerMetrics:
    """Owns the registry, and the tokens of all requests, which the engine's thread alone counts."""

    def __init__(self, figures: Figures) -> None:
        self.prompt_tokens = 0  # of prompts that were read, or known from earlier ones
        self.completion_tokens = 0
        self.registry = registry = new_registry(figures)
        self.requests = Counter(
            "expert_serving_worker_requests",
            "Requests that have ended, by how.",
            (_KIND, "outcome"),
            registry=registry,
        )
        self.queue = seconds(registry, "worker_queue", "From a request's arrival until it had a place.")
        self.first_token = seconds(
            registry, "worker_time_to_first_token", "From a request's arrival to its first token."
        )
        self.inter_token = seconds(
            registry, "worker_inter_token_latency", "Between two tokens of one continuation."
        )
        self.duration = seconds(
            registry, "worker_request_duration", "From a request's arrival to its end.", (_KIND,)
        )


def figures_of(stats: pb.WorkerStats, model: pb.ModelInfoReply) -> Iterator[Metric]:
    """Families of a worker's counters."""
    yield info(
        "worker",
        "What this worker serves, and how.",
        {
            "model": model.model,
            "fingerprint": model.fingerprint,
            "device": model.device,
            "dtype": model.dtype,
            "policy": stats.policy,
        },
    )
    yield from _requests(stats)
    yield from _prefix_cache(stats)
    yield from _cache(stats)
    yield from _fetching(stats)
    yield from _memory(stats)
    parts = {name.removesuffix("_seconds"): value for name, value in _fields(stats.parts)}
    parts |= {"routed_experts": stats.cache.compute_seconds, "fetching": stats.cache.fetch_seconds}
    text = "Where the model's time went, by the host's clock."
    yield counters_by("worker_part_seconds", text, "part", parts.items())


def _requests(stats: pb.WorkerStats) -> Iterator[Metric]:
    yield gauge("worker_ready", "1 while requests are taken, as the health service says.", stats.ready)
    yield gauge("worker_requests_running", "Requests that have a place.", stats.running)
    yield gauge("worker_requests_waiting", "Requests that wait for their first place.", stats.waiting)
    yield gauge("worker_requests_set_aside", "Requests whose next sample waits for a place.", stats.set_aside)
    yield gauge(
        "worker_prompt_state_bytes",
        "RAM for states of prompts with samples to come.",
        stats.prompt_state_bytes,
    )
    yield counter("worker_prompt_tokens", "Tokens of prompts, read or cached.", stats.prompt_tokens)
    yield counter("worker_completion_tokens", "Tokens written.", stats.completion_tokens)
    yield counter("worker_requests_unread", "Ended, as their clients did not read.", stats.requests_unread)
    yield gauge("worker_places", "Sequences that there is memory for.", stats.places)
    yield gauge("worker_places_taken", "Of these, sequences in progress.", stats.places_taken)
    yield gauge("worker_store_attached", "1 while the expert store is there.", stats.store == "attached")


def _prefix_cache(stats: pb.WorkerStats) -> Iterator[Metric]:
    yield counter("worker_prefix_lookups", "Prompts looked up in the prefix cache.", stats.prefix_lookups)
    yield counter("worker_prefix_hits", "Of these, prompts that began as another had.", stats.prefix_hits)
    yield counter("worker_prefix_saved_tokens", "Tokens that were not read again.", stats.prefix_saved_tokens)
    yield gauge("worker_prefix_snapshots", "Beginnings that are kept.", stats.prefix_snapshots)
    yield gauge("worker_prefix_bytes", "RAM that they take.", stats.prefix_bytes)
    yield gauge("worker_prefix_budget_bytes", "RAM that they may take.", stats.prefix_budget)


def _cache(stats: pb.WorkerStats) -> Iterator[Metric]:
    hits = [(str(n), float(layer.hits)) for n, layer in enumerate(stats.layers)]
    misses = [(str(n), float(layer.misses)) for n, layer in enumerate(stats.layers)]
    yield counters_by("worker_expert_hits", "Experts a step needed and found in a slot.", "layer", hits)
    yield counters_by("worker_expert_misses", "Experts a step needed and did not find.", "layer", misses)
    on_cpu = "Missing experts that a GPU's worker computed on the CPU."
    yield counter("worker_cpu_experts", on_cpu, stats.cache.misses_on_cpu)
    yield gauge(
        "worker_slots_per_layer", "Slots of each layer; 0: experts stay in frames.", stats.slots_per_layer
    )
    yield gauge("worker_slots_pinned", "Slots that a step is using.", stats.slots_pinned)
    yield gauge("worker_slots_bytes", "Memory of all slots.", stats.slot_bytes)


def _fetching(stats: pb.WorkerStats) -> Iterator[Metric]:
    yield counter("worker_fetched_bytes", "Records copied from frames to slots.", stats.cache.bytes_fetched)
    yield counter("worker_staged_experts", "Misses that waited for the store's disk.", stats.cache.staged)
    yield counter("worker_hints", "Experts named before their need.", stats.hints_sent)
    yield counter("worker_hints_useful", "Of these, experts that were needed then.", stats.hints_useful)
    yield counter(
        "worker_prefetch_useful_bytes", "Fetched before the need, and needed.", stats.prefetch_useful_bytes
    )
    yield counter(
        "worker_prefetch_wasted_bytes", "Fetched before the need, in vain.", stats.prefetch_wasted_bytes
    )


def _memory(stats: pb.WorkerStats) -> Iterator[Metric]:
    """Of the device; the host's is the process's own metric."""
    if stats.vram_budget:
        yield gauge("worker_vram_budget_bytes", "Device memory that may be taken.", stats.vram_budget)
        yield gauge("worker_vram_used_bytes", "Device memory taken now.", stats.vram_used)
        yield gauge("worker_vram_peak_bytes", "The most that was taken.", stats.vram_peak)
        yield gauge(
            "worker_vram_tensors_peak_bytes", "Of the peak, what lived at once.", stats.vram_tensors_peak
        )


def _fields(parts: pb.PartSeconds) -> Iterator[tuple[str, float]]:
    for field in parts.DESCRIPTOR.fields:
        yield field.name, getattr(parts, field.name)
