"""The scheduler: the one thread that steps jobs through the engine, first come, first served.

Jobs arrive from the event loop by `submit`, and every submitted job gets exactly one ending, through its
`on_end`: None when it finished or was cancelled, else the error. A `ServingError` fails the one job; anything
else is a broken invariant or a failed device, and ends the process. Of a failed device, one line is logged.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import Exhausted, ServingError, Unavailable
from gpu_worker.device_errors import DeviceFailed, device_failure
from gpu_worker.engine import Engine
from gpu_worker.jobs import Job

log = logging.getLogger(__name__)

MAX_WAITING = 256


@dataclass
class _Entry:
    job: Job
    on_end: Callable[[BaseException | None], None]


class Scheduler:
    """Owns the engine's thread and the queue before it."""

    def __init__(
        self, engine: Engine, on_fatal: Callable[[BaseException], object], budget: int | None = None
    ) -> None:
        """`budget`: bytes of device memory, for those who are told that they did not suffice."""
        self.failed = 0
        self._engine, self._on_fatal, self._budget = engine, on_fatal, budget
        self._waiting: deque[_Entry] = deque()
        self._running: _Entry | None = None
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return int(self._running is not None)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job, on_end: Callable[[BaseException | None], None]) -> None:
        """Queue a job; raises Exhausted when the queue is full, Unavailable when the worker is stopping."""
        with self._changed:
            if self._stopping:
                raise Unavailable("the worker is stopping")
            self._drop_cancelled()
            if len(self._waiting) >= MAX_WAITING:
                raise Exhausted(f"{MAX_WAITING} requests are waiting already; try again later")
            self._waiting.append(_Entry(job, on_end))
            self._changed.notify()

    def stop(self, timeout: float) -> bool:
        """Fail what waits and what runs, and end the thread; False if its step has not ended by then."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (entry := self._next()) is not None:
                self._serve(entry)
        except DeviceFailed as failure:
            log.critical("%s", failure)
            log.debug("as it was raised", exc_info=failure)
            self._on_fatal(failure)
        except BaseException as failure:  # an invariant broke: the process ends, loudly
            log.critical("the engine failed", exc_info=failure)
            self._on_fatal(failure)
        with self._changed:
            self._stopping = True
            left = list(self._waiting)
            self._waiting.clear()
            self._running = None
        for entry in left:
            entry.on_end(Unavailable("the worker is stopping"))

    def _drop_cancelled(self) -> None:
        """Clients that gave up while waiting make room."""
        for entry in [entry for entry in self._waiting if entry.job.cancelled]:
            self._waiting.remove(entry)
            entry.on_end(None)

    def _next(self) -> _Entry | None:
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._stopping or self._waiting)
            if self._stopping:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _serve(self, entry: _Entry) -> None:
        """One job from begin to its one ending; raises what is not the job's own failure."""
        error: BaseException | None = None
        try:
            self._run_job(entry.job)
        except ServingError as failure:
            self.failed += 1
            error = failure
        except BaseException as failure:
            error = device_failure(failure, self._budget)
            if error is not None:
                raise error from failure
            error = failure
            raise
        finally:
            entry.on_end(error)

    def _run_job(self, job: Job) -> None:
        if job.cancelled:
            return
        job.begin(self._engine)
        try:
            while not job.cancelled and not job.step(self._engine):
                if self._stopping:
                    raise Unavailable("the worker is stopping")
        finally:
            job.end(self._engine)
        self._engine.check_integrity()
