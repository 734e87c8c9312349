"""Runs the benchmarks named, or all that need nothing; prints tables and one JSON line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import clients
import codec
import errors
import five_blocks
import full
import gateway
import kernels
import loading
import machine
import policies
import records
import round_trip
import scheduler_share
from measure import Comparison, Figure
from rich.console import Console
from rich.table import Table

from common.errors import ServingError

GROUPS: dict[str, Callable[[], Iterator[Any]]] = {
    "records": records.benchmark,
    "loading": loading.benchmark,
    "errors": errors.benchmark,
    "codec": codec.benchmark,
    "kernels": kernels.benchmark,
    "round-trip": round_trip.benchmark,
    "five-blocks": five_blocks.benchmark,
    "clients": clients.benchmark,
    "gateway": gateway.benchmark,
    "scheduler": scheduler_share.benchmark,
    "policies": policies.benchmark,
}
FULL = "full"


def main() -> None:
    options = _options()
    chosen = options.groups or list(GROUPS)
    groups = {**GROUPS, FULL: lambda: full.benchmark(_full(options))}
    try:
        results = [result for group in chosen for result in groups[group]()]
    except ServingError as error:  # such as a checkpoint that is none
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    console = Console(width=None if sys.stdout.isatty() else 180)
    tables = ((Comparison, _comparisons), (Figure, _figures), (errors.PackingError, errors.table))
    for kind, table in tables:
        if some := [result for result in results if isinstance(result, kind)]:
            console.print(table(some))
    described = {"machine": machine.describe(), "arguments": sys.argv[1:]}
    print(json.dumps({**described, "results": [result.as_dict() for result in results]}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ", ".join((*GROUPS, FULL))
    parser.add_argument("groups", nargs="*", help=f"any of: {names} (default: all but {FULL})")
    whole = parser.add_argument_group(FULL, "a checkpoint that is there, larger than the store's memory")
    whole.add_argument("--checkpoint", type=Path, help="a packed directory")
    whole.add_argument("--ram", default="8GB", help="the store's memory for experts (default: 8GB)")
    whole.add_argument("--dense-bits", type=int, help="as of gpu-worker start")
    whole.add_argument("--prompt", type=int, default=32, help="tokens of the prompt (default: 32)")
    whole.add_argument("--new", type=int, default=64, help="tokens to generate (default: 64)")
    whole.add_argument("--runs", type=int, default=5, help="generations after a first one (default: 5)")
    options = parser.parse_args()
    if unknown := set(options.groups) - {*GROUPS, FULL}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {names}")
    if (FULL in options.groups) != (options.checkpoint is not None):
        parser.error(f"{FULL} and --checkpoint DIR go together")
    if options.prompt < 1 or options.new < 2 or options.runs < 1:
        parser.error("at least --prompt 1, --new 2 and --runs 1")
    return options


def _full(options: argparse.Namespace) -> full.Options:
    named = {name: value for name, value in vars(options).items() if name != "groups"}
    return full.Options(**named)


def _comparisons(results: Sequence[Comparison]) -> Table:
    table = Table(title="ours against theirs, medians of paired runs; above 1: ours is faster")
    for column in ("what", "ours", "", "theirs", "", "ratio", "spread", "goal"):
        table.add_column(column)
    for r in results:
        table.add_row(
            r.what, r.ours, f"{r.our_rate:.4g} {r.unit}", r.theirs, f"{r.their_rate:.4g} {r.unit}",
            f"{r.ratio:.2f}", f"{r.lowest:.2f} to {r.highest:.2f}", _verdict(r.met, r.at_least, None),
        )  # fmt: skip
    return table


def _figures(figures: Sequence[Figure]) -> Table:
    table = Table(title="and what stands alone")
    for column in ("what", "measured", "spread", "goal"):
        table.add_column(column)
    for f in figures:
        spread = "" if f.lowest is None else f"{f.lowest:.3g} to {f.highest:.3g}"
        table.add_row(f.what, f"{f.value:.3g} {f.unit}", spread, _verdict(f.met, f.at_least, f.at_most))
    return table


def _verdict(met: bool | None, at_least: float | None, at_most: float | None) -> str:
    if met is None:
        return ""
    bound = f">= {at_least:.3g}" if at_least is not None else f"<= {at_most:.3g}"
    return f"{bound}: {'met' if met else 'missed'}"


if __name__ == "__main__":
    main()
