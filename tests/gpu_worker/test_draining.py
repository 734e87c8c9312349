"""From starting to the end: whole workers in this process, what they accept when, and how long they take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from common.errors import Unavailable
from common.process import EXIT_INVARIANT
from gpu_worker.client import WorkerClient
from tests.helpers.workers import LocalWorker, QuietLink, local_worker

PROMPT = [1, 2, 3]
LONG: dict[str, Any] = {"max_new_tokens": 500, "ignore_eos": True}
BRIEF: dict[str, Any] = {"max_new_tokens": 100, "ignore_eos": True}


@pytest.fixture
def start(quiet_link: QuietLink, tmp_path: Path) -> Iterator[Callable[..., LocalWorker]]:
    """Starts a worker whose steps take 5 ms, so that 100 tokens take half a second."""
    with ExitStack() as stack:

        def start(**options: Any) -> LocalWorker:
            worker = stack.enter_context(local_worker(quiet_link, tmp_path, max_sequences=1, **options))
            worker.step_seconds = 0.005
            return worker

        yield start


def test_what_was_accepted_finishes_and_nothing_else_is_accepted(start: Callable[..., LocalWorker]) -> None:
    """One request runs, one waits for its place; both are answered before the worker ends."""
    worker = start()
    with worker.client() as client:
        running, waiting = client.generate(PROMPT, **BRIEF), client.generate(PROMPT, **BRIEF)
        answers = [next(running)]
        queued = threading.Thread(target=lambda: answers.extend(waiting))
        queued.start()
        until(lambda: client.stats().waiting == 1)
        assert client.serving()
        reply = client.stop()
        assert (reply.calls, reply.drain_timeout) == (2, 30.0)
        until(lambda: not client.serving())
        stats = client.stats()
        assert (stats.state, stats.ready) == ("draining", False)
        with pytest.raises(Unavailable, match=r"draining.*send this request elsewhere"):
            next(client.generate(PROMPT))
        answers += running
        queued.join(20)
    assert worker.join() == 0
    assert sum(event.HasField("finish") for event in answers) == 2


def test_a_worker_without_requests_ends_at_once(start: Callable[..., LocalWorker]) -> None:
    worker = start()
    started = time.monotonic()
    worker.stop()
    assert worker.join() == 0
    assert time.monotonic() - started < 10  # of 30 that requests might take


def test_what_does_not_finish_in_time_is_handed_back(start: Callable[..., LocalWorker]) -> None:
    """The stream that had begun is told; the request that had not is asked again by its own client."""
    worker = start(drain_timeout=0.3)
    told: list[str] = []

    def wait_in_queue() -> None:
        with WorkerClient(worker.address, retry_for=1.0) as client, pytest.raises(Unavailable) as failure:
            client.answers(PROMPT, **LONG)
        told.append(str(failure.value))

    with worker.client() as client:
        stream = client.generate(PROMPT, **LONG)
        next(stream)
        queued = threading.Thread(target=wait_in_queue)
        queued.start()
        until(lambda: client.stats().waiting == 1)
        started = time.monotonic()
        worker.stop()
        with pytest.raises(Unavailable, match="worker is stopping"):
            list(stream)
    assert worker.join() == 0
    assert 0.3 <= time.monotonic() - started < 10
    queued.join(20)
    assert "tried again for" in told[0]  # and there was no other worker


def test_a_failure_while_draining_ends_the_worker(start: Callable[..., LocalWorker]) -> None:
    worker = start()
    with worker.client() as client:
        stream = client.generate(PROMPT, **LONG)
        next(stream)
        worker.stop()
        until(lambda: client.stats().state == "draining")
        started = time.monotonic()
        worker.call(lambda: worker.worker.fail(AssertionError("a test")))  # type: ignore[union-attr]
        with pytest.raises(Unavailable):
            list(stream)
    assert worker.join() == EXIT_INVARIANT
    assert time.monotonic() - started < 10  # of 30


def test_a_worker_that_has_failed_accepts_nothing(
    start: Callable[..., LocalWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on, however long the step in progress takes to end."""
    worker, ended = start(), threading.Event()
    assert worker.worker is not None
    assert worker.worker._scheduler is not None
    stop = worker.worker._scheduler.stop
    monkeypatch.setattr(worker.worker._scheduler, "stop", lambda timeout: ended.wait(20) and stop(timeout))
    with worker.client() as client:
        worker.call(partial(worker.worker.fail, AssertionError("a test")))
        try:
            until(lambda: not client.serving())
            with pytest.raises(Unavailable, match=r"draining.*send this request elsewhere"):
                next(client.generate(PROMPT))
        finally:
            ended.set()
    assert worker.join() == EXIT_INVARIANT


def test_a_worker_that_starts_says_what_it_waits_for(
    quiet_link: QuietLink, start: Callable[..., LocalWorker]
) -> None:
    """Loading is in a thread of its own, so health answers all the while."""
    quiet_link.may_attach.clear()
    worker = start()
    with worker.client() as client:
        until(lambda: "it waits for its store" in refusal(client))
        assert not client.serving()
        quiet_link.may_attach.set()
        until(client.serving)
        assert client.answers(PROMPT, max_new_tokens=1)[0].finish


def test_stopping_a_worker_that_starts(quiet_link: QuietLink, start: Callable[..., LocalWorker]) -> None:
    quiet_link.may_attach.clear()
    worker = start()
    with worker.client() as client:
        until(lambda: "starting" in refusal(client))
        client.stop()
    assert worker.join() == 0


def test_a_lost_store_makes_a_worker_unready_only_if_experts_are_missing(
    quiet_link: QuietLink, start: Callable[..., LocalWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    attachment = quiet_link.attachment
    worker = start()
    with worker.client() as client:
        monkeypatch.setattr(quiet_link, "attachment", None)
        time.sleep(0.8)  # health is looked after twice a second
        assert (client.serving(), client.stats().ready, client.stats().store) == (True, True, "lost")
        with monkeypatch.context() as patch:
            patch.setattr(attachment.arena, "missing", lambda: 1)
            until(lambda: not client.serving())
            assert not client.stats().ready
            assert client.stats().state == "serving"
        monkeypatch.setattr(quiet_link, "attachment", attachment)
        until(client.serving)


def refusal(client: WorkerClient) -> str:
    try:
        client.stats()
    except Unavailable as error:
        return str(error)
    return ""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
