"""Runs the benchmarks named, or all that need nothing; prints tables and one JSON line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import codec
import errors
import five_blocks
import kernels
import loading
import machine
import records
import round_trip
from measure import Comparison, Figure
from rich.console import Console
from rich.table import Table

GROUPS: dict[str, Callable[[], Iterator[Any]]] = {
    "records": records.benchmark,
    "loading": loading.benchmark,
    "errors": errors.benchmark,
    "codec": codec.benchmark,
    "kernels": kernels.benchmark,
    "round-trip": round_trip.benchmark,
    "five-blocks": five_blocks.benchmark,
}


def main() -> None:
    options = _options()
    chosen = options.groups or list(GROUPS)
    results = [result for group in chosen for result in GROUPS[group]()]
    console = Console(width=None if sys.stdout.isatty() else 180)
    tables = ((Comparison, _comparisons), (Figure, _figures), (errors.PackingError, errors.table))
    for kind, table in tables:
        if some := [result for result in results if isinstance(result, kind)]:
            console.print(table(some))
    described = {"machine": machine.describe(), "arguments": sys.argv[1:]}
    print(json.dumps({**described, "results": [result.as_dict() for result in results]}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ", ".join(GROUPS)
    parser.add_argument("groups", nargs="*", help=f"any of: {names} (default: all)")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {names}")
    return options


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
