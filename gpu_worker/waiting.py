"""Who gets the next free place: jobs that wait for their first, and requests whose next sample waits for one.

Those with more priority go first, equals in order of arrival; a request's further samples arrive one by one,
each when the one before it begins, so that many samples do not keep out other requests. Nobody starves: who
was passed over MOST_PASSED times by later arrivals is passed over no more, whatever their priority.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpu_worker.jobs import Job

MOST_PASSED = 16


@dataclass(eq=False)
class _Entry:
    job: Job
    passed: int = 0  # times that a later arrival was taken

    @property
    def order(self) -> tuple[bool, int]:
        """The least goes first; equals by arrival."""
        overdue = self.passed >= MOST_PASSED
        return not overdue, 0 if overdue else -self.job.priority


class WaitingJobs:
    """A queue that a few hundred fit in."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []  # in order of arrival

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Job]:
        return iter([entry.job for entry in self._entries])

    @property
    def new(self) -> int:
        """Those who wait for their first place."""
        return sum(not job.begun for job in self)

    def push(self, job: Job) -> None:
        self._entries.append(_Entry(job))

    def pop(self) -> Job:
        """Whoever is next."""
        chosen = min(self._entries, key=lambda entry: entry.order)
        position = self._entries.index(chosen)
        for entry in self._entries[:position]:
            entry.passed += 1
        del self._entries[position]
        return chosen.job

    def discard(self, job: Job) -> None:
        """It waits no more, if it did."""
        self._entries = [entry for entry in self._entries if entry.job is not job]
