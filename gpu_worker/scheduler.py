"""The scheduler: the one thread that steps jobs through the engine, several at a time.

    submit --> WAITING --> PREFILL --the prompt is read--> SAMPLES: each waits, then decodes --> ENDED

Jobs join and leave between steps. What one iteration of the thread does is `_iterate`, from top to bottom: a
prompt, however long, delays the next token of everybody else by one chunk at most, since between two chunks
there is always a step of decode. Where a prompt is cut does not depend on what else runs.

Jobs arrive from the event loop by `submit`, and every submitted job gets exactly one ending, through its
`on_end`: None when it finished or was cancelled, else the error. A place in the pools is all the memory that
a sequence takes, so an admitted one never lacks any. A request goes on with one place if it has to, however
many samples it has: they wait for further ones beside the requests that wait for their first (`waiting`).
Between two samples it has no claim to that one either, and is set aside if somebody else is next. A
`ServingError` fails the jobs of the step that raised it, and only those; anything else is a broken invariant
or a failed device, and ends the process. Of a failed device, one line is logged.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from common.errors import Exhausted, ServingError
from common.origin import Origin, working_for
from gpu_worker.device_errors import DeviceFailed, device_failure
from gpu_worker.engine import Engine
from gpu_worker.jobs import Generation, Job
from gpu_worker.lifecycle import handed_back, not_accepted
from gpu_worker.prefix_cache.next_turns import IDLE_SECONDS, NextTurns
from gpu_worker.samples import Sample
from gpu_worker.waiting import WaitingJobs

log = logging.getLogger(__name__)

OnEnd = Callable[[BaseException | None], None]

_MOST_ASIDE = 4  # requests whose prompts are kept on the host while they have no place; or as many as places


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
        self._waiting = WaitingJobs()
        self._prefilling: deque[Job] = deque()  # the first is the next to read a chunk
        self._sampling: list[Generation] = []  # whose prompts are read
        self._next_turns = NextTurns(engine)  # to be read when there is nothing else to do
        self._stopping = False
        self._changed = threading.Condition()  # guards what waits; all else is the engine's thread's
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Jobs that wait for their first place."""
        return self._waiting.new

    @property
    def jobs(self) -> list[Job]:
        """All that have not ended, in order of arrival."""
        return list(self._endings)

    @property
    def running(self) -> int:
        """Jobs that have a place."""
        return len(self._prefilling) + sum(not job.aside for job in list(self._sampling))

    @property
    def set_aside(self) -> int:
        """Jobs that had a place and have further samples that wait for one."""
        return sum(job.aside for job in list(self._sampling))

    @property
    def prompt_state_bytes(self) -> int:
        """Of host memory, for samples that have not begun."""
        return sum(job.prompt_state_bytes for job in list(self._sampling))

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job, on_end: OnEnd) -> None:
        """Queue a job; raises Exhausted when the queue is full, NotAccepting when the worker stops."""
        with self._changed:
            if self._stopping:
                raise not_accepted()
            self._drop_waiting()
            # Those for whom a place is free wait for the end of a step, no longer.
            if self.waiting >= self._max_queue + self._engine.free_places + self._next_turns.places:
                raise Exhausted(f"{self._max_queue} requests are waiting already; try again later")
            self._endings[job] = on_end
            self._waiting.push(job)
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
        stopping = handed_back()
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
        for job, on_end in self._endings.items():
            on_end(failure if failure is not None and job.begun else stopping)
        if failure is not None:
            self._on_fatal(failure)

    def _wait_for_work(self) -> bool:
        """False when there is to be no further step."""
        with self._changed:
            self._changed.wait_for(self._busy, IDLE_SECONDS if self._next_turns else None)
            return not self._stopping

    def _busy(self) -> bool:
        return self._stopping or len(self._waiting) > 0 or self._begun > 0

    def _iterate(self) -> None:
        if not self._busy():
            if self._next_turns:  # else whoever had arrived has given up again
                self._next_turns.read(interrupted=self._busy)
            return
        self._drop_cancelled()
        self._admit()  # while there are places, and whoever is next for one
        self._prefill()  # one chunk of one prompt
        self._drop_cancelled()
        self._decode()  # one token for every sample, in one step or several

    def _drop_cancelled(self) -> None:
        """They take part in no further step, and their places are free."""
        with self._changed:
            self._drop_waiting()
        for job in self._running_jobs():
            if job.cancelled:
                self._end(job)

    def _admit(self) -> None:
        """No more than there are places now: samples of one token are not begun without end. A place that is
        kept between two samples is for whoever is next, like any other."""
        kept = [job for job in self._sampling if job.place >= 0]  # of requests between two samples
        most_aside = max(_MOST_ASIDE, self._engine.pools.sequences)
        if sum(job.aside for job in self._sampling) + len(kept) > most_aside:
            for generation in kept:  # they go on at once
                self._begin_sample(generation)
            kept = []
        for _ in range(self._engine.free_places + len(kept)):
            job = self._next_waiting()
            if job is None:
                break
            if job.place < 0 and not self._engine.free_places:
                self._set_one_aside()
            if isinstance(job, Generation) and job.begun:
                self._begin_sample(job)
            else:
                job.begin(self._engine)
                self._prefilling.append(job)

    def _set_one_aside(self) -> None:
        """Of the requests that keep a place for their next sample, and do not have the next turn."""
        with self._changed:
            kept = [job for job in self._waiting if isinstance(job, Generation) and job.place >= 0]
        kept[-1].set_aside(self._engine)

    def _next_waiting(self) -> Job | None:
        with self._changed:
            return self._waiting.pop() if self._waiting else None

    def _prefill(self) -> None:
        """Prompts take turns, so that a short one need not wait for the end of a long one."""
        if not self._prefilling:
            return
        for sample in self._decoding:  # what they have chosen need not wait for the chunk
            sample.stream_chosen()
        job = self._prefilling[0]
        with self._blaming([job]):
            if not job.prefill(self._engine):
                self._prefilling.rotate(-1)
            elif isinstance(job, Generation):
                self._sampling.append(job)
                self._prefilling.popleft()
                self._begin_sample(job)
            else:
                self._end(job)

    def _begin_sample(self, job: Generation) -> None:
        with self._blaming([job]):
            ended = job.next_sample(self._engine)
            with self._changed:
                self._waiting.discard(job)
                if job.more:
                    self._waiting.push(job)
            if ended:
                self._end_sample(job.running[-1])

    def _decode(self) -> None:
        samples = self._decoding
        for size in self._engine.divide(len(samples)):
            taking_part, samples = samples[:size], samples[size:]
            # Not those that have ended by the failure of another sample, nor those that gave up meanwhile.
            self._step([s for s in taking_part if s.request in self._endings and not s.request.cancelled])

    def _step(self, samples: Sequence[Sample]) -> None:
        """The next token of each."""
        engine, logits = self._engine, None
        if not samples:
            return
        # A step that fails leaves states half-way, those of all its sequences.
        with self._blaming([sample.request for sample in samples]):
            logits = engine.decode(
                [sample.place for sample in samples], [sample.output[-1] for sample in samples]
            )
        if logits is None:
            return
        assert engine.best is not None
        for sample in self._decoding:
            sample.stream_chosen()  # while the device is at it
        for row, sample in enumerate(samples):
            if sample.request in self._endings:  # not if an earlier sample of it has failed
                with self._blaming([sample.request]):
                    if sample.accept(engine, logits[row], engine.best[row]):
                        self._end_sample(sample)

    def _end_sample(self, sample: Sample) -> None:
        job = sample.request
        job.end_sample(sample, self._engine)
        if job.done:
            self._end(job)
            if len(job.samples) == 1:
                self._next_turns.note(job.prompt, sample.output)

    @contextmanager
    def _blaming(self, jobs: Sequence[Job]) -> Iterator[None]:
        """The block works for these jobs; a ServingError in it is their ending."""
        try:
            with working_for(Origin.merged(job.origin for job in jobs)):
                yield
        except ServingError as error:
            _forget_locals(error)
            for job in dict.fromkeys(jobs):
                self._end(job, error)

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        """The ending of a job that has a place, which is free afterwards."""
        if isinstance(job, Generation) and job in self._sampling:
            self._sampling.remove(job)
            with self._changed:
                self._waiting.discard(job)
        else:
            self._prefilling.remove(job)
        job.end(self._engine)
        (self._engine.experts if self._begun else self._engine).check_integrity()
        self.failed += error is not None
        self._endings.pop(job)(error)

    def _drop_waiting(self) -> None:
        """Clients that gave up while waiting make room."""
        for job in self._waiting:
            if job.cancelled and not job.begun:
                self._waiting.discard(job)
                self._endings.pop(job)(None)

    @property
    def _begun(self) -> int:
        """Jobs that are not new and have not ended."""
        return len(self._prefilling) + len(self._sampling)

    @property
    def _decoding(self) -> list[Sample]:
        return [sample for job in self._sampling for sample in job.running]

    def _running_jobs(self) -> list[Job]:
        return [*self._prefilling, *self._sampling]


def _forget_locals(error: BaseException) -> None:
    """Of the frames that it came through. As long as somebody has the error, a lost store's arena would stay
    mapped otherwise, and the frames of who awaits a request are in a cycle with it."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__context__
