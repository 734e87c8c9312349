"""How the worker's counters, and the account of its memory, look on a terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from common.rpc import gpu_worker_pb2 as pb
from common.units import format_bytes

if TYPE_CHECKING:
    from gpu_worker.account import Account  # PyTorch comes with it, and clients do not need that


def finish_table(finish: pb.Finish) -> Table:
    """The counters of one request."""
    usage, timings, cache = finish.usage, finish.timings, finish.cache
    table = Table(show_header=False, title="this request", title_justify="left")
    known = f", {usage.cached_prompt_tokens} of them known" if usage.cached_prompt_tokens else ""
    table.add_row(
        "finished", f"{finish.reason}, {usage.completion_tokens} tokens after {usage.prompt_tokens}{known}"
    )
    table.add_row("waited", f"{timings.queue_ms:.0f} ms, then {timings.prefill_ms:.0f} ms of prefill")
    table.add_row("decode", f"{timings.decode_ms:.0f} ms, {timings.tokens_per_second:.1f} tokens/s")
    table.add_row("slots", _hits(cache))
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
        ("cache", _hits(cache)),
        ("fetched", f"{format_bytes(cache.bytes_fetched)}; {cache.staged} experts came from disk"),
        ("device memory", _vram(stats)),
        ("prefetch", f"{stats.prefetch}; {stats.hints_sent} guesses, {stats.hints_useful} useful"),
        ("fetched early", _fetched_early(stats)),
        ("state", stats.state if stats.ready or stats.state != "serving" else "serving, but not ready"),
        ("requests", f"{stats.requests}, of which {stats.requests_failed} failed and "
                     f"{stats.requests_cancelled} were given up"),
        ("now", requests_now(stats)),
        ("prompts kept", _prompts_kept(stats)),
        ("slow clients", f"{stats.requests_unread} did not read what came" if stats.requests_unread else ""),
        ("tokens", f"{stats.prompt_tokens} read, {stats.completion_tokens} written"),
        ("prefix cache", _prefixes(stats)),
        ("time", _shares(stats.parts, cache)),
        ("store", stats.store),
        ("up", f"{stats.uptime_seconds:.0f} s"),
    ):  # fmt: skip
        if value:
            table.add_row(name, value)
    return table


def account_table(account: Account) -> Table:
    """How memory is divided, with the budget below it."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=account.budget is not None)
    table.add_column("purpose", footer="budget")
    table.add_column("size", footer=format_bytes(account.budget or 0), justify="right")
    table.add_column("", footer=account.reason)
    for entry in account.entries:
        table.add_row(entry.purpose, format_bytes(entry.nbytes), entry.note)
    slots = (
        f"{account.slots} of {account.experts} a layer, {format_bytes(account.slot_bytes)} for one in each"
    )
    table.add_row("slots", format_bytes(account.total - account.other_bytes), slots)
    if account.budget is not None:
        table.add_row("not used", format_bytes(account.budget - account.total))
    return table


def as_text(table: Table) -> str:
    """For logs, which may be no terminal."""
    text = io.StringIO()
    Console(file=text, width=110).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def requests_now(stats: pb.WorkerStats) -> str:
    aside = f"{stats.set_aside} set aside, " if stats.set_aside else ""
    return f"{stats.running} running, {aside}{stats.waiting} waiting"


def _prompts_kept(stats: pb.WorkerStats) -> str:
    """Nothing unless a request has samples to come."""
    size = stats.prompt_state_bytes
    return f"{format_bytes(size)} of RAM for states that further samples begin with" if size else ""


def _vram(stats: pb.WorkerStats) -> str:
    """Nothing on a CPU."""
    if not stats.vram_budget:
        return ""
    budget, peak, used, tensors = map(
        format_bytes, (stats.vram_budget, stats.vram_peak, stats.vram_used, stats.vram_tensors_peak)
    )
    return f"at most {peak} of {budget} (tensors {tensors}), now {used}"


def _hits(cache: pb.CacheCounters) -> str:
    on_cpu = f", {cache.misses_on_cpu} of them computed on the CPU" if cache.misses_on_cpu else ""
    return f"{cache.hits} hits, {cache.misses} misses{on_cpu}: {cache.hit_rate:.1%} hit rate"


def _fetched_early(stats: pb.WorkerStats) -> str:
    """Nothing where only the store fetches before the need."""
    useful, wasted = stats.prefetch_useful_bytes, stats.prefetch_wasted_bytes
    if not useful + wasted:
        return ""
    return f"{format_bytes(useful)} that were needed, {format_bytes(wasted)} in vain"


def _prefixes(stats: pb.WorkerStats) -> str:
    if not stats.prefix_budget:
        return "off"
    taken = f"{format_bytes(stats.prefix_bytes)} of {format_bytes(stats.prefix_budget)}"
    return (
        f"{stats.prefix_hits} of {stats.prefix_lookups} prompts, {stats.prefix_saved_tokens} tokens not read "
        f"again; {stats.prefix_snapshots} snapshots, {taken}"
    )


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
