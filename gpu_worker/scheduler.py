"""The scheduler: the one thread that steps jobs through the engine, several at a time.

    submit --> WAITING --> PREFILL --the prompt is read--> DECODE --> ENDED

Jobs join and leave between steps. What one iteration of the thread does is `_iterate`, from top to bottom: a
prompt, however long, delays the next token of everybody else by one chunk at most, since between two chunks
there is always a step of decode. Where a prompt is cut does not depend on what else runs.

Jobs arrive from the event loop by `submit`, and every submitted job gets exactly one ending, through its
`on_end`: None when it finished or was cancelled, else the error. A place in the pools is all the memory that
a job takes, so an admitted one never lacks any. A `ServingError` fails the jobs of the step that raised it,
and only those; anything else is a broken invariant or a failed device, and ends the process. Of a failed
device, one line is logged.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from common.errors import Exhausted, ServingError, Unavailable
from gpu_worker.device_errors import DeviceFailed, device_failure
from gpu_worker.engine import Engine
from gpu_worker.jobs import Generation, Job

log = logging.getLogger(__name__)

OnEnd = Callable[[BaseException | None], None]


class Scheduler:
    """Owns the engine's thread and the queue before it."""

    def __init__(
        self,
        engine: Engine,
        max_queue: int,
        on_fatal: Callable[[BaseException], object],
        budget: int | None = None,
    ) -> None:
        """`budget`: bytes of device memory, for those who are told that they did not suffice."""
        self.failed = 0
        self._engine, self._max_queue, self._on_fatal, self._budget = engine, max_queue, on_fatal, budget
        self._endings: dict[Job, OnEnd] = {}  # of all jobs below; whoever takes one out tells it
        self._waiting: deque[Job] = deque()
        self._prefilling: deque[Job] = deque()  # the first is the next to read a chunk
        self._decoding: list[Generation] = []
        self._stopping = False
        self._changed = threading.Condition()  # guards what waits; all else is the engine's thread's
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that have a place."""
        return len(self._prefilling) + len(self._decoding)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job, on_end: OnEnd) -> None:
        """Queue a job; raises Exhausted when the queue is full, Unavailable when the worker is stopping."""
        with self._changed:
            if self._stopping:
                raise Unavailable("the worker is stopping")
            self._drop_waiting()
            # Those for whom a place is free wait for the end of a step, no longer.
            if len(self._waiting) >= self._max_queue + self._free_places:
                raise Exhausted(f"{self._max_queue} requests are waiting already; try again later")
            self._endings[job] = on_end
            self._waiting.append(job)
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
        stopping = Unavailable("the worker is stopping")
        failure: BaseException | None = None
        try:
            while self._wait_for_work():
                self._iterate()
            for job in self._running_jobs():
                self._end(job, stopping)
        except BaseException as error:  # the process ends, and nothing is asked of the engine any more
            failure = device_failure(error, self._budget) or error
            if isinstance(failure, DeviceFailed):
                log.critical("%s", failure)
                log.debug("as it was raised", exc_info=error)
            else:
                log.critical("the engine failed", exc_info=error)
        with self._changed:
            self._stopping = True
            waiting = set(self._waiting)
            self._waiting.clear()
        for job, on_end in self._endings.items():
            on_end(failure if failure is not None and job not in waiting else stopping)
        if failure is not None:
            self._on_fatal(failure)

    def _wait_for_work(self) -> bool:
        """False when there is to be no further step."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self.running)
            return not self._stopping

    def _iterate(self) -> None:
        self._drop_cancelled()
        self._admit()  # first come, first served, while there are places
        self._prefill()  # one chunk of one prompt
        self._drop_cancelled()
        self._decode()  # one token for everyone whose prompt is read

    def _drop_cancelled(self) -> None:
        """They take part in no further step, and their places are free."""
        with self._changed:
            self._drop_waiting()
        for job in self._running_jobs():
            if job.cancelled:
                self._end(job)

    def _admit(self) -> None:
        with self._changed:
            admitted = [self._waiting.popleft() for _ in range(min(self._free_places, len(self._waiting)))]
            self._prefilling += admitted
        for job in admitted:
            job.begin(self._engine)

    def _prefill(self) -> None:
        """Prompts take turns, so that a short one need not wait for the end of a long one."""
        if not self._prefilling:
            return
        for generation in self._decoding:  # what they have chosen need not wait for the chunk
            generation.stream_chosen()
        job = self._prefilling[0]
        with self._blaming([job]):
            if job.prefill(self._engine):
                self._end(job)
            elif isinstance(job, Generation) and job.prompt_read:
                self._decoding.append(job)
                self._prefilling.popleft()
            else:
                self._prefilling.rotate(-1)

    def _decode(self) -> None:
        engine, jobs = self._engine, list(self._decoding)
        if not jobs:
            return
        # A step that fails leaves states half-way, those of all its sequences.
        with self._blaming(jobs):
            logits = engine.decode([job.place for job in jobs], [job.output[-1] for job in jobs])
            assert engine.best is not None
            for job in jobs:
                job.stream_chosen()  # while the device is at it
            for row, job in enumerate(jobs):
                with self._blaming([job]):
                    if job.accept(engine, logits[row], engine.best[row]):
                        self._end(job)

    @contextmanager
    def _blaming(self, jobs: Sequence[Job]) -> Iterator[None]:
        """A ServingError in the block is the ending of these jobs."""
        try:
            yield
        except ServingError as error:
            for job in jobs:
                self._end(job, error)

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        """The ending of a job that has a place, which is free afterwards."""
        if isinstance(job, Generation) and job in self._decoding:
            self._decoding.remove(job)
        else:
            self._prefilling.remove(job)
        job.end(self._engine)
        (self._engine.experts if self.running else self._engine).check_integrity()
        self.failed += error is not None
        self._endings.pop(job)(error)

    def _drop_waiting(self) -> None:
        """Clients that gave up while waiting make room."""
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            self._endings.pop(job)(None)

    def _running_jobs(self) -> list[Job]:
        return [*self._prefilling, *self._decoding]

    @property
    def _free_places(self) -> int:
        return self._engine.pools.sequences - self.running
