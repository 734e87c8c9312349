"""The scheduler: every submitted job gets exactly one ending, whatever happens to it."""

import logging
import threading

import pytest
import torch

from common.errors import Exhausted, Unavailable
from gpu_worker import scheduler as scheduler_module
from gpu_worker.device_errors import DeviceFailed
from gpu_worker.jobs import Job
from gpu_worker.scheduler import Scheduler


class Places:
    """As much of an engine as jobs need to begin and end."""

    def __init__(self) -> None:
        self.taken = 0
        self.experts = self
        self.counters = self.model = self.times = self

    def copy(self) -> None:
        """Of counters and times nobody reads."""

    def take_place(self) -> int:
        self.taken += 1
        return 0

    def give_place(self, place: int) -> None:
        self.taken -= 1

    def check_integrity(self) -> None:
        assert self.taken == 0


class Steps(Job):
    """A job of some steps, which may wait for the test or raise."""

    def __init__(self, steps: int = 1, error: BaseException | None = None) -> None:
        super().__init__(emit=print)
        self.left, self.error = steps, error
        self.stepping, self.gate = threading.Event(), threading.Event()
        self.endings: list[BaseException | None] = []
        self.ended = threading.Event()

    def step(self, engine: object) -> bool:
        self.stepping.set()
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        self.left -= 1
        return self.left == 0

    def on_end(self, error: BaseException | None) -> None:
        self.endings.append(error)
        self.ended.set()


@pytest.fixture
def fatal() -> list[BaseException]:
    return []


@pytest.fixture
def scheduler(fatal: list[BaseException]):
    scheduler = Scheduler(Places(), fatal.append)  # type: ignore[arg-type]
    scheduler.start()
    yield scheduler
    assert scheduler.stop(30)


def submit(scheduler: Scheduler, job: Steps, run: bool = True) -> Steps:
    scheduler.submit(job, job.on_end)
    if run:
        job.gate.set()
    return job


def test_first_come_first_served(scheduler: Scheduler) -> None:
    jobs = [submit(scheduler, Steps(3)) for _ in range(4)]
    for job in jobs:
        assert job.ended.wait(30)
    assert [job.endings for job in jobs] == [[None]] * 4


def test_a_failed_job_fails_alone(scheduler: Scheduler, fatal: list[BaseException]) -> None:
    gone = Unavailable("the store is gone")
    failed, next_one = submit(scheduler, Steps(error=gone)), submit(scheduler, Steps())
    assert next_one.ended.wait(30)
    assert (failed.endings, next_one.endings, fatal) == ([gone], [None], [])
    assert scheduler.failed == 1


def test_a_broken_invariant_ends_everything_and_everyone_is_told(
    scheduler: Scheduler, fatal: list[BaseException]
) -> None:
    broken = AssertionError("a slot is lost")
    first, waiting = submit(scheduler, Steps(error=broken), run=False), submit(scheduler, Steps())
    first.gate.set()
    assert waiting.ended.wait(30)
    assert first.endings == [broken]
    assert fatal == [broken]
    assert isinstance(waiting.endings[0], Unavailable)
    with pytest.raises(Unavailable, match="stopping"):
        submit(scheduler, Steps())


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "budget of 7.6 GB"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "unspecified launch failure"),
    ],
)
def test_a_failed_device_ends_everything_in_one_line(
    fatal: list[BaseException], error: Exception, names: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = Scheduler(Places(), fatal.append, budget=7_600_000_000)  # type: ignore[arg-type]
    scheduler.start()
    with caplog.at_level(logging.INFO):
        first, waiting = submit(scheduler, Steps(error=error), run=False), submit(scheduler, Steps())
        first.gate.set()
        assert waiting.ended.wait(30)
        assert scheduler.stop(30)
    (failure,) = fatal
    assert isinstance(failure, DeviceFailed) and names in str(failure)
    assert first.endings == [failure]
    assert isinstance(waiting.endings[0], Unavailable)
    assert [(record.getMessage(), record.exc_info) for record in caplog.records] == [(str(failure), None)]


def test_stopping_ends_what_runs_and_what_waits(scheduler: Scheduler) -> None:
    running, waiting = submit(scheduler, Steps(1000), run=False), submit(scheduler, Steps())
    assert running.stepping.wait(30)
    stopper = threading.Thread(target=scheduler.stop, args=(30,))
    stopper.start()
    running.gate.set()
    stopper.join(30)
    for job in (running, waiting):
        assert len(job.endings) == 1
        assert isinstance(job.endings[0], Unavailable)


def test_a_full_queue_refuses_and_who_gave_up_makes_room(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "MAX_WAITING", 2)
    running = submit(scheduler, Steps(), run=False)
    assert running.stepping.wait(30)
    waiting = [submit(scheduler, Steps()) for _ in range(2)]
    with pytest.raises(Exhausted, match="2 requests are waiting"):
        submit(scheduler, Steps())
    waiting[0].cancelled = True
    late = submit(scheduler, Steps())
    running.gate.set()
    assert late.ended.wait(30)
    assert [job.endings for job in (*waiting, late)] == [[None]] * 3
    assert waiting[0].left == 1  # it never ran
