"""How long work on bytes is shown: a bar in a terminal, a line now and then anywhere else.

Used for everything that takes long here (packing, verifying, loading), so this file owns the columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from common.units import format_bytes

LINE_INTERVAL = 10.0  # seconds


@contextmanager
def progress_bar(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield the function to call with the bytes that are done and those there are in all.

    What is done at the first call counts as there before: it took no time.
    """
    if not console.is_terminal:
        lines = _Lines(console, title)
        yield lines.update
        lines.print()
        return
    console.print(title, markup=False, highlight=False)  # a line of its own: figures fit beside the bar
    columns = (
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int) -> None:
            if bar.tasks[task].total is None:
                bar.reset(task, completed=done, total=total)
            bar.update(task, completed=done)

        yield update


class _Lines:
    """The same in lines: for log files, and for whoever reads a terminal through a pipe."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._first: int | None = None
        self._started = self._printed = time.monotonic()
        self._done = self._total = 0

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = done, now
        self._done, self._total = done, total
        if now - self._printed >= LINE_INTERVAL:
            self.print()

    def print(self) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._started
        rate = (self._done - (self._first or 0)) / seconds if seconds else 0.0
        share = self._done / self._total if self._total else 1.0
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate and share < 1 else ""
        amounts = f"{format_bytes(self._done)} of {format_bytes(self._total)}"
        line = f"{self._title}: {share:.0%}, {amounts}, {format_bytes(rate)}/s{left}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
