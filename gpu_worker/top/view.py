"""One frame of the live view. Made for 80 columns and up, and to be read without colour as well."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from common.rpc import gpu_worker_pb2 as pb
from common.units import format_bytes
from gpu_worker.printing import requests_now
from gpu_worker.top.heat_map import heat_map
from gpu_worker.top.history import Answer, History

_COURSE = "▁▂▃▄▅▆▇"  # a full block would touch the line above
_STATES = {"decode": "green", "prefill": "cyan", "waiting": "yellow", "set aside": "yellow"}
_LABEL = "dim"
_RULE_AND_HEADER = 2  # lines above the sequences


class View:
    """Draws a history as wide as the terminal; `problem` is why it is not of now, `height` the most lines."""

    def __init__(self, history: History | None, problem: str = "", height: int | None = None) -> None:
        self._history, self._problem, self._height = history, problem, height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        above: list[RenderableType] = []
        if self._problem:
            above.append(Text(f"! {self._problem}", style="bold red"))
        if self._history is not None:
            width = options.max_width
            above += [_head(self._history), Rule(style=_LABEL), _figures(self._history, width)]
            above.append(_memory(self._history.newest, width))
            above += heat_map(self._history.hit_rates(), width, console.color_system is not None)
        yield Group(*above)
        if self._history is not None:
            used = len(console.render_lines(Group(*above), options, pad=False)) + _RULE_AND_HEADER
            yield Rule(style=_LABEL)
            rows = None if self._height is None else self._height - used
            yield _sequences(self._history.newest.worker, rows)


def _head(history: History) -> Table:
    model, worker = history.model, history.newest.worker
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    line.add_column(justify="right", no_wrap=True)
    policy, _, _ = worker.policy.partition(",")
    name = Text.assemble((model.model, "bold"), f"  {model.device}, {model.dtype}, {policy}")
    line.add_row(name, f"up {duration(worker.uptime_seconds)}")
    return line


def _figures(history: History, width: int) -> Table:
    """Rates with their courses on the left, states on the right."""
    points = max(6, (width - 64) // 2 + 6)
    worker, store = history.newest.worker, history.newest.store
    counts: list[tuple[str, Callable[[Answer], int | None], Callable[[float], str]]] = [
        ("decode", lambda answer: answer.worker.completion_tokens, _tokens),
        ("prompts", lambda answer: answer.worker.prompt_tokens, _tokens),
        ("link", lambda answer: answer.worker.cache.bytes_fetched, format_bytes),
        ("disk", lambda answer: answer.store.staged_bytes if answer.store else None, format_bytes),
    ]
    ended = worker.requests - worker.running - worker.set_aside - worker.waiting
    frames = f", {store.ready_frames:,} of {store.frames:,} frames" if store else ""
    states = [
        ("requests", requests_now(worker)),
        ("ended", f"{ended:,}, {worker.requests_failed:,} of them failed"),
        ("slots", _slots(worker, history.model)),
        ("store", worker.store + frames),
    ]
    table = Table.grid(expand=True, padding=(0, 1))
    for style in (_LABEL, "bold", "cyan", _LABEL, ""):
        table.add_column(style=style, no_wrap=True, overflow="ellipsis", ratio=1 if style == "" else None)
    for (label, count, told), state in zip(counts, states, strict=True):
        rates = history.rates(count, points)
        value = f"{told(rates[-1] if rates else 0.0)}/s"
        table.add_row(f"{label:<8}", f"{value:>12}", _course(rates, points) + " ", *state)
    return table


def _memory(answer: Answer, width: int) -> Table:
    worker, store = answer.worker, answer.store
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(style=_LABEL, no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    if worker.vram_budget:
        size = max(10, width // 3)
        share = min(1.0, worker.vram_used / worker.vram_budget)
        bar = "█" * round(share * size) + "░" * (size - round(share * size))
        used, budget, peak = map(format_bytes, (worker.vram_used, worker.vram_budget, worker.vram_peak))
        table.add_row(f"{'VRAM':<8}", f"{bar} {used} of {budget}, at most {peak}")
    held = f"worker {format_bytes(worker.resident_bytes)}"
    if store is not None:
        held += f", store {format_bytes(store.resident_bytes)} (arena {format_bytes(store.arena_bytes)})"
    table.add_row(f"{'RAM':<8}", held)
    return table


def _sequences(worker: pb.WorkerStats, rows: int | None) -> Table:
    """As many as there is room for; of those that do not fit, their number."""
    table = Table(box=None, expand=True, padding=(0, 1), header_style=_LABEL, pad_edge=False)
    table.add_column("request", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("state", no_wrap=True)
    for name in ("prompt", "output", "tok/s", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = list(worker.sequences)
    if rows is not None and len(shown) > rows:
        shown = shown[: max(0, rows - 1)]
    for sequence in shown:
        read, whole = sequence.prompt_tokens_read, sequence.prompt_tokens
        table.add_row(
            Text(sequence.request_id or "-"),  # a client's, which must not be taken for markup
            Text(sequence.state, style=_STATES.get(sequence.state, "")),
            f"{read:,}/{whole:,}" if sequence.state == "prefill" else f"{whole:,}",
            f"{sequence.completion_tokens:,}",
            f"{sequence.tokens_per_second:.1f}" if sequence.tokens_per_second else "-",
            duration(sequence.age_seconds),
        )
    requests = worker.running + worker.set_aside + worker.waiting  # of many, not all are told one by one
    if left := max(len(worker.sequences), requests) - len(shown):
        table.add_row(Text(f"and {left} more", style=_LABEL))
    elif not shown:
        table.add_row(Text("no request is in progress", style=_LABEL))
    return table


def _slots(worker: pb.WorkerStats, model: pb.ModelInfoReply) -> str:
    if not worker.slots_per_layer:
        return "none: experts stay in frames"
    return f"{worker.slots_per_layer} of {model.experts_per_layer} a layer, {format_bytes(worker.slot_bytes)}"


def _course(rates: list[float], points: int) -> str:
    """A bar for each rate, the highest of those shown at full height; nothing at all is a low line."""
    most = max(rates, default=0.0)
    bars = [_COURSE[ceil(rate / most * (len(_COURSE) - 1)) if most else 0] for rate in rates]
    return "".join(bars).rjust(points)


def _tokens(rate: float) -> str:
    return f"{rate:,.0f} tok" if rate >= 100 else f"{rate:.1f} tok"


def duration(seconds: float) -> str:
    """With two units at most: 3 h 12 min."""
    whole = int(seconds)
    for size, unit, smaller, rest in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {rest}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
