"""Who gets the next free place, and how long somebody can be passed over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.jobs import Job
from gpu_worker.waiting import MOST_PASSED, WaitingJobs


def job(priority: int) -> Job:
    made = Job(emit=print)
    made.priority = priority
    return made


def test_more_priority_goes_first_and_equals_in_order_of_arrival() -> None:
    waiting, jobs = WaitingJobs(), [job(priority) for priority in (0, 2, -1, 2, 0)]
    for each in jobs:
        waiting.push(each)
    assert [jobs.index(waiting.pop()) for _ in jobs] == [1, 3, 0, 4, 2]
    assert len(waiting) == 0


def test_a_job_that_gave_up_is_not_next() -> None:
    waiting, jobs = WaitingJobs(), [job(0) for _ in range(3)]
    for each in jobs:
        waiting.push(each)
    waiting.discard(jobs[0])
    waiting.discard(jobs[0])
    assert list(waiting) == jobs[1:] and waiting.new == 2
    jobs[1].begun = 1.0
    assert waiting.new == 1 and waiting.pop() is jobs[1]


@given(st.lists(st.integers(-3, 3) | st.none(), max_size=200))
def test_nobody_is_passed_over_more_often_than_stated(arrivals: list[int | None]) -> None:
    """Numbers are arrivals of that priority, None a place that becomes free; at last, all get one."""
    waiting, passed = WaitingJobs(), dict[Job, int]()
    for arrival in [*arrivals, *[None] * len(arrivals)]:
        if arrival is not None:
            passed[made := job(arrival)] = 0
            waiting.push(made)
        elif len(waiting):
            chosen = waiting.pop()
            for earlier in passed:  # in order of arrival
                if earlier is chosen:
                    break
                passed[earlier] += 1
            assert passed.pop(chosen) <= MOST_PASSED
    assert not passed


def test_the_bound_is_reached_and_kept() -> None:
    """A stream of urgent jobs: one of no urgency goes after as many as stated."""
    waiting, patient = WaitingJobs(), job(-5)
    waiting.push(patient)
    for _ in range(MOST_PASSED):
        waiting.push(job(1))
        waiting.push(job(1))
        assert waiting.pop() is not patient
    assert waiting.pop() is patient
