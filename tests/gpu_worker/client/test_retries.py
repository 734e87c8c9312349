"""When a call is made again, by a clock that a test sets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from common.errors import Exhausted, Unavailable
from gpu_worker.client import retries
from gpu_worker.client.retries import Attempts

GONE = Unavailable("the worker is gone")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def fail_on(attempts: Attempts, clock: SimpleNamespace) -> None:
    """Until there is to be no further attempt."""
    while True:
        clock.now += attempts.pause_after(GONE)


def test_the_time_to_retry_counts_from_the_first_failure(clock: SimpleNamespace) -> None:
    """A call that waited long before it failed is made again like any other."""
    attempts = Attempts(retry_for=10.0, timeout=None)
    clock.now += 60.0
    failed = clock.now
    with pytest.raises(Unavailable) as told:
        fail_on(attempts, clock)
    assert 8.0 <= clock.now - failed <= 10.0
    assert str(told.value) == f"the worker is gone (tried again for {clock.now - failed:.1f} s)"


def test_the_callers_own_limit_counts_from_its_call(clock: SimpleNamespace) -> None:
    attempts = Attempts(retry_for=10.0, timeout=60.5)
    clock.now += 60.0
    with pytest.raises(Unavailable):
        fail_on(attempts, clock)
    assert 1060.0 < clock.now <= 1060.5


def test_a_refusal_that_says_when_is_asked_again_then_and_not_before(clock: SimpleNamespace) -> None:
    attempts = Attempts(retry_for=10.0, timeout=None)
    assert 4.0 < attempts.pause_after(Exhausted("too many a minute", retry_after=4)) <= 4.1


@pytest.mark.parametrize(("retry_for", "after"), [(10.0, 10), (10.0, None), (0.0, 1)])
def test_a_refusal_that_ends_too_late_or_never_is_told_as_it_is(
    clock: SimpleNamespace, retry_for: float, after: int | None
) -> None:
    """Whoever asked sees when to come back."""
    refusal = Exhausted("too many a minute", retry_after=after)
    with pytest.raises(Exhausted) as told:
        Attempts(retry_for, timeout=None).pause_after(refusal)
    assert told.value is refusal


def test_no_time_to_retry_is_no_second_attempt(clock: SimpleNamespace) -> None:
    with pytest.raises(Unavailable) as told:
        Attempts(retry_for=0.0, timeout=None).pause_after(GONE)
    assert told.value is GONE
