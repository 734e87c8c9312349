"""Runs the benchmarks named, or all; prints a table and one JSON line."""

from __future__ import annotations

import argparse
import json
import platform
import sys

import five_blocks
import kernels
import records
import round_trip
import torch
from measure import Comparison, Figure
from rich.console import Console
from rich.table import Table

GROUPS = {
    "records": records.benchmark,
    "kernels": kernels.benchmark,
    "round-trip": round_trip.benchmark,
    "five-blocks": five_blocks.benchmark,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"any of: {', '.join(GROUPS)} (default: all)")
    chosen = parser.parse_args().groups or list(GROUPS)
    unknown = set(chosen) - GROUPS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    results = [result for group in chosen for result in GROUPS[group]()]
    console = Console(width=None if sys.stdout.isatty() else 160)
    comparisons = [result for result in results if isinstance(result, Comparison)]
    figures = [result for result in results if isinstance(result, Figure)]
    for table in [_table(comparisons)] * bool(comparisons) + [_figures(figures)] * bool(figures):
        console.print(table)
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": torch.get_num_threads(),
    }
    print(json.dumps({"machine": machine, "results": [result.as_dict() for result in results]}))


def _table(results: list[Comparison]) -> Table:
    table = Table(title="ours against theirs, medians of paired runs; above 1: ours is faster")
    for column in ("what", "ours", "", "theirs", "", "ratio", "spread", "goal"):
        table.add_column(column)
    for r in results:
        table.add_row(
            r.what, r.ours, f"{r.our_rate:.4g} {r.unit}", r.theirs, f"{r.their_rate:.4g} {r.unit}",
            f"{r.ratio:.2f}", f"{r.lowest:.2f} to {r.highest:.2f}",
            f">= {r.goal:.2f}: {'met' if r.met else 'missed'}",
        )  # fmt: skip
    return table


def _figures(figures: list[Figure]) -> Table:
    table = Table(title="and what was measured beside", show_header=False)
    for figure in figures:
        table.add_row(figure.what, f"{figure.value:.3g} {figure.unit}")
    return table


if __name__ == "__main__":
    sys.exit(main())
