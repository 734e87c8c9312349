"""When a failed call is made again, and after which pause. Used by both clients.

A worker that restarts refuses calls for seconds. A call that has produced nothing is then made again, with
pauses that grow, until it succeeds or the stated time since its first failure is over. So is one that was
refused with the time after which it may be accepted, but not before then. A call that has streamed something
is never made again: its answer would begin anew.
"""

from __future__ import annotations

import random
import time

from common.errors import DeadlineExceeded, Exhausted, ServingError, Unavailable

RETRY_FOR = 10.0  # seconds; a worker whose store keeps the experts restarts within five
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0


class Attempts:
    """One call's attempts: within `retry_for` seconds of the first that fails, which may have taken long, and
    within the caller's own `timeout` of now (None: none)."""

    def __init__(self, retry_for: float, timeout: float | None) -> None:
        now = time.monotonic()
        self._retry_for = retry_for
        self._failed: float | None = None  # when the first attempt did
        self._deadline = None if timeout is None else now + timeout
        self._pause = _FIRST_PAUSE

    @property
    def time_left(self) -> float | None:
        """What the next attempt may take; for gRPC's `timeout`."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause_after(self, error: ServingError) -> float:
        """Seconds to wait before the next attempt; raises the error if there is to be none."""
        told = error.retry_after if isinstance(error, Exhausted) else None
        gone = isinstance(error, Unavailable) and not isinstance(error, DeadlineExceeded)
        if not self._retry_for or not (gone or told is not None):
            raise error
        pause = self._pause * random.uniform(0.5, 1.0)  # clients of one worker should not return in step
        pause += told or 0
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        now = time.monotonic()
        if self._failed is None:
            self._failed = now
        until = self._failed + self._retry_for
        if now + pause > min(until, self._deadline or until):
            if not gone:
                raise error  # which says when
            raise Unavailable(f"{error} (tried again for {now - self._failed:.1f} s)")
        return pause
