"""How the worker's counters look on a terminal."""

from __future__ import annotations

from rich.table import Table

from common.rpc import gpu_worker_pb2 as pb
from common.units import format_bytes


def finish_table(finish: pb.Finish) -> Table:
    """The counters of one request."""
    usage, timings, cache = finish.usage, finish.timings, finish.cache
    table = Table(show_header=False, title="this request", title_justify="left")
    table.add_row(
        "finished", f"{finish.reason}, {usage.completion_tokens} tokens after {usage.prompt_tokens}"
    )
    table.add_row("waited", f"{timings.queue_ms:.0f} ms, then {timings.prefill_ms:.0f} ms of prefill")
    table.add_row("decode", f"{timings.decode_ms:.0f} ms, {timings.tokens_per_second:.1f} tokens/s")
    table.add_row("slots", f"{cache.hits} hits, {cache.misses} misses: {cache.hit_rate:.1%} hit rate")
    table.add_row("fetched", f"{format_bytes(cache.bytes_fetched)}; {cache.staged} experts came from disk")
    table.add_row("time", _shares(finish.parts, cache, (timings.prefill_ms + timings.decode_ms) / 1e3))
    return table


def stats_table(stats: pb.WorkerStats, info: pb.ModelInfoReply) -> Table:
    """The counters of a worker since its start."""
    cache = stats.cache
    table = Table(show_header=False, title=f"gpu worker: {info.model}", title_justify="left")
    for name, value in (
        ("device", f"{info.device}, {info.dtype}, context {info.max_context}"),
        ("slots", _slots(stats, info)),
        ("cache", f"{cache.hits} hits, {cache.misses} misses: {cache.hit_rate:.1%} hit rate"),
        ("fetched", f"{format_bytes(cache.bytes_fetched)}; {cache.staged} experts came from disk"),
        ("prefetch", f"{stats.prefetch}; {stats.hints_sent} hints, {stats.hints_useful} useful"),
        ("requests", f"{stats.requests} ({stats.requests_failed} failed), {stats.running} running, "
                     f"{stats.waiting} waiting"),
        ("tokens", f"{stats.prompt_tokens} read, {stats.completion_tokens} written"),
        ("time", _shares(stats.parts, cache)),
        ("store", stats.store),
        ("up", f"{stats.uptime_seconds:.0f} s"),
    ):  # fmt: skip
        table.add_row(name, value)
    return table


def _slots(stats: pb.WorkerStats, info: pb.ModelInfoReply) -> str:
    if not stats.slots_per_layer:
        return f"none: experts are computed in the store's memory ({stats.policy})"
    counted = f"{stats.slots_per_layer} of {info.experts_per_layer} a layer"
    return f"{counted}, {format_bytes(stats.slot_bytes)}, {stats.policy}"


def _shares(parts: pb.PartSeconds, cache: pb.CacheCounters, total: float | None = None) -> str:
    """Where the time went, largest first; without a total, that of the model's parts alone."""
    seconds = {
        "routed experts": cache.compute_seconds,
        "fetching": cache.fetch_seconds,
        "routers and shared experts": parts.moe_seconds,
        "Mamba": parts.mamba_seconds,
        "attention": parts.attention_seconds,
        "MLP": parts.mlp_seconds,
        "lm_head": parts.lm_head_seconds,
    }
    if total is not None:
        seconds["the rest"] = total - sum(seconds.values())
    whole = total or sum(seconds.values())
    shown = sorted(((s, name) for name, s in seconds.items() if whole and s >= whole / 200), reverse=True)
    return ", ".join(f"{s / whole:.0%} {name}" for s, name in shown) or "-"
