"""Every request and its one ending, and the times that clients see."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# What may become of a request. Anything else is a fault.
FINISHED, REFUSED, INVALID = "finished", "queue was full", "refused as invalid"
CANCELLED, DEADLINE, GONE = "cancelled", "deadline passed", "connection was cut"


class Entry:
    """One request, open until `end`."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger, self._name = ledger, name
        self.ending: str | None = None

    def end(self, ending: str) -> None:
        if self.ending is not None:
            self._ledger.faults.append(f"{self._name}: {ending} after it had ended: {self.ending}")
        self.ending = ending
        self._ledger.endings[ending] += 1

    def wrong(self, text: str) -> None:
        """The request ends with what must not be."""
        self._ledger.faults.append(f"{self._name}: {text}")
        self.end("wrong")


@dataclass
class Ledger:
    """Owns the counts. For one event loop."""

    asked: Counter[str] = field(default_factory=Counter)  # by the client's way
    endings: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)  # seconds
    between_tokens: list[float] = field(default_factory=list)
    open: int = 0

    @contextmanager
    def request(self, way: str) -> Iterator[Entry]:
        """The block has one request, and ends it exactly once."""
        self.asked[way] += 1
        self.open += 1
        entry = Entry(self, f"{way} {sum(self.asked.values())}")
        try:
            yield entry
        except Exception as error:  # noqa: BLE001 -- whatever a client raises is what this is about
            entry.wrong(f"{type(error).__name__}: {error}")
        finally:
            self.open -= 1
        if entry.ending is None:
            entry.wrong("no ending")


class Stopwatch:
    """When the tokens of one request came; what is not finished is not noted."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._last: dict[int, float] = {}  # by continuation
        self._first: float | None = None
        self._between: list[float] = []

    def token(self, index: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now - self._started
        if index in self._last:
            self._between.append(now - self._last[index])
        self._last[index] = now

    def note(self, ledger: Ledger) -> None:
        if self._first is not None:
            ledger.first_token.append(self._first)
        ledger.between_tokens += self._between
