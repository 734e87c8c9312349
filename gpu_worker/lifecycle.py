"""What a worker is at: starting, serving, or draining; and the calls that are in progress meanwhile.

    STARTING --serve--> SERVING --drain--> DRAINING

Requests are accepted while SERVING only. Draining ends when the last one that was accepted has ended, or
when whoever drains waits no longer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import Unavailable

STARTING, SERVING, DRAINING = "starting", "serving", "draining"


class NotAccepting(Unavailable):
    """Nothing went wrong: the worker is not up yet, or about to end."""


def not_accepted() -> NotAccepting:
    """The answer to a request that comes too late."""
    return NotAccepting(
        "the worker is stopping, and this request was not accepted; "
        "send it elsewhere, or again once a worker is back"
    )


def handed_back() -> Unavailable:
    """The ending of a request that the end of the worker cuts off."""
    return Unavailable("the worker is stopping, and this request had not finished; send it again")


class Lifecycle:
    """Owns the state and the count of calls. For the event loop alone."""

    def __init__(self) -> None:
        self.state = STARTING
        self.doing = "it waits for its store"  # while starting, for those who ask too early
        self.calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def serve(self) -> None:
        assert self.state == STARTING
        self.state = SERVING

    def drain(self) -> None:
        assert self.state == SERVING
        self.state = DRAINING

    def check_loaded(self) -> None:
        """Raises NotAccepting before there is a model."""
        if self.state == STARTING:
            raise NotAccepting(f"the worker is starting: {self.doing}; try again when it is ready")

    @contextmanager
    def call(self) -> Iterator[None]:
        """The block is a request in progress; raises NotAccepting if none is accepted."""
        self.check_loaded()
        if self.state == DRAINING:
            raise NotAccepting(
                "the worker is draining: it finishes what it has and ends; "
                "send this request elsewhere, or again once a worker is back"
            )
        self.calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.calls -= 1
            if not self.calls:
                self._idle.set()

    async def idle(self) -> None:
        """Until no call is in progress."""
        await self._idle.wait()
