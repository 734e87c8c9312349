"""When a call is made again, by a clock that a test sets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from common.errors import Unavailable
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


def test_no_time_to_retry_is_no_second_attempt(clock: SimpleNamespace) -> None:
    with pytest.raises(Unavailable) as told:
        Attempts(retry_for=0.0, timeout=None).pause_after(GONE)
    assert told.value is GONE
