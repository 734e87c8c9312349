"""Hints to the store: which experts will probably be needed, and whether saying so pays.

A hint can only help where an expert is absent from RAM and reading it from disk can overlap with compute.
So hints are sent only while the store lacks frames, and with `auto` only as long as enough of them turn out
useful: wrong hints cost disk bandwidth and evict frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.expert_key import ExpertKey
from gpu_worker.slots.fetch import Fetcher

# With `auto`: judged over this many hints; switched off below this useful share, and tried again after a
# number of misses. A third is what a random guess of top-k out of the absent experts never reaches.
_JUDGED_HINTS = 512
_USEFUL_SHARE = 1 / 3
_RETRY_MISSES = 4096
_REMEMBERED = 8192


@dataclass
class HintCounters:
    """Experts named before their need; and what moved to this worker's memory because of that."""

    sent: int = 0
    useful: int = 0  # a later miss of a hinted expert found it READY
    useful_bytes: int = 0  # of records that were needed then
    wasted_bytes: int = 0  # of records, and parts of records, that were not


class Prefetching(Protocol):
    """What is told of fetching before the need, whoever does it."""

    @property
    def counters(self) -> HintCounters:
        """Since the start."""

    def describe(self) -> str:
        """What is in force, and why."""


class Hints:
    """Sends hints for one worker; `mode` is on, off or auto."""

    def __init__(self, mode: str, fetcher: Fetcher) -> None:
        self.mode = mode
        self.counters = HintCounters()
        self._fetcher = fetcher
        self._open: dict[ExpertKey, None] = {}  # hinted and not needed since; insertion-ordered
        self._judged = HintCounters()
        self._paused_misses = 0

    def wanted(self) -> bool:
        """Whether predicting the next layer's experts is worth its cost now."""
        return self.mode != "off" and self._paused_misses == 0 and not self._fetcher.all_fit()

    def describe(self) -> str:
        """What is in force, and why."""
        if self.mode == "off":
            return "off (asked for)"
        if self._fetcher.all_fit():
            return "off (every expert is in RAM)"
        if self._paused_misses:
            return f"off (fewer than {_USEFUL_SHARE:.0%} of the last {_JUDGED_HINTS} hints were useful)"
        return "on (experts are staged from disk)" if self.mode == "auto" else "on (asked for)"

    def send(self, keys: Sequence[ExpertKey]) -> None:
        """Hint those that are absent from the arena."""
        absent = self._fetcher.hint(keys)
        self.counters.sent += len(absent)
        self._judged.sent += len(absent)
        for key in absent:
            self._open[key] = None
        while len(self._open) > _REMEMBERED:
            del self._open[next(iter(self._open))]
        self._judge()

    def note_misses(self, keys: Sequence[ExpertKey], staged: set[ExpertKey]) -> None:
        """These experts were fetched; those in `staged` were not READY and made the step wait."""
        for key in keys:
            if key in self._open:
                del self._open[key]
                if key not in staged:
                    self.counters.useful += 1
                    self._judged.useful += 1
        self._paused_misses = max(0, self._paused_misses - len(keys))

    def _judge(self) -> None:
        if self.mode != "auto" or self._judged.sent < _JUDGED_HINTS:
            return
        if self._judged.useful < _USEFUL_SHARE * self._judged.sent:
            self._paused_misses = _RETRY_MISSES
        self._judged = HintCounters()
