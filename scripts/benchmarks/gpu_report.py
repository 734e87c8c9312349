"""What the GPU's benchmark reports: rows of a table as they are measured, each kept as JSON at once.

A run may be cut off at any moment, so nothing is held back: a row is printed and written as soon as it is
there. Not done here: measuring anything.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from rich.console import Console

_SHOWN_LINES = 12

console = Console(highlight=False, soft_wrap=True, markup=False)


class Spread(NamedTuple):
    """What several measurements of one thing gave."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    @property
    def range(self) -> str:
        return f"{self.lowest:.4g} to {self.highest:.4g}"


@dataclass(frozen=True)
class Row:
    """One row. Its fields become JSON; `cells` are what the table shows of them, by column."""

    title: ClassVar[str] = ""  # stands over the rows of its kind

    group: str

    def cells(self) -> dict[str, str]:
        raise NotImplementedError


class Report:
    """Prints rows, writes them to a file line by line, and in the end prints all of them as one JSON line."""

    def __init__(self, path: Path | None, logs: Path | None, described: dict[str, Any]) -> None:
        """Both files, of rows and of what processes say, are appended to: what is there stays."""
        self._path, self._logs, self._described = path, logs, described
        self._rows: list[dict[str, Any]] = []
        self._columns: list[tuple[str, int]] = []
        self._titled = ""
        self._started = time.monotonic()
        self._keep({"run": described})

    def add(self, row: Row) -> None:
        cells = row.cells()
        if (row.title, [*cells]) != (self._titled, [name for name, _ in self._columns]):
            self._titled = row.title
            self._columns = [(name, max(len(name), len(cell))) for name, cell in cells.items()]
            console.print(f"\n{row.title}\n" + "  ".join(name.rjust(width) for name, width in self._columns))
        console.print("  ".join(cells[name].rjust(width) for name, width in self._columns))
        self._add({"group": row.group, **asdict(row)})

    def failed(self, group: str, what: str, reason: str) -> None:
        """Something of a group could not be measured; of `reason`, which may be a log, the end is shown."""
        lines = [line for line in reason.splitlines() if line.strip()][-_SHOWN_LINES:]
        console.print(f"{group}, {what}: not measured\n  " + "\n  ".join(lines), style="bold")
        self._add({"group": group, "what": what, "not_measured": lines})

    def log(self, text: str) -> None:
        """What a process said."""
        if self._logs is not None:
            with self._logs.open("a") as file:
                file.write(f"{text}\n")

    def note(self, text: str) -> None:
        """How far it is; no figure."""
        console.print(f"[{time.monotonic() - self._started:.0f} s] {text}", style="dim")

    def close(self) -> None:
        """All rows as one JSON line."""
        print(json.dumps({**self._described, "results": self._rows}), flush=True)

    def _add(self, values: dict[str, Any]) -> None:
        self._rows.append(values)
        self._keep(values)

    def _keep(self, values: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(values) + "\n")
