"""Ending with requests in progress: what becomes of them, and how the processes end."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest

from common.errors import Unavailable
from gpu_worker.client import Answers, WorkerClient
from tests.system.processes import READY, Pair, Process, eventually

PROMPT = [3, 1, 4, 1, 5]
COUNT = 480  # what the tiny model's context takes
LONG: dict[str, Any] = {
    "samples": 32,
    "max_new_tokens": COUNT,
    "ignore_eos": True,
}  # takes far longer than a test does


def test_sigterm_lets_a_stream_finish_and_refuses_another(pair: Pair) -> None:
    pair.start_store()
    pair.start_worker()
    expected = pair.generate(PROMPT, COUNT).token_ids
    answers = Answers()
    with WorkerClient(pair.worker_address, retry_for=0) as client:
        stream = client.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True)
        answers.add(next(stream))
        pair.worker.signal(signal.SIGTERM)
        eventually(lambda: not client.serving(), READY, "draining")
        with pytest.raises(Unavailable, match=r"draining|is it running"):  # it may have ended by then
            pair.generate(PROMPT, 1)
        for event in stream:
            answers.add(event)
    assert answers.complete()[0].token_ids == expected
    assert pair.worker.popen.wait(READY) == 0
    pair.store.stop()
    assert pair.leftovers() == []


def test_the_stop_command_hands_back_what_takes_too_long(pair: Pair) -> None:
    """Whoever has had no token yet is answered by the worker's successor, and knows nothing of it."""
    pair.start_store()
    pair.start_worker("--max-sequences", "1", "--drain-timeout", "0.2")
    expected = pair.generate(PROMPT, 20).token_ids
    handed_back: list[list[int]] = []

    def ask_patiently() -> None:
        with WorkerClient(pair.worker_address, retry_for=READY) as client:
            handed_back.append(client.answers(PROMPT, max_new_tokens=20, ignore_eos=True)[0].token_ids)

    with WorkerClient(pair.worker_address, retry_for=0) as client:
        stream = client.generate(PROMPT, **LONG)
        next(stream)
        waiting = threading.Thread(target=ask_patiently)
        waiting.start()
        eventually(lambda: client.stats().waiting == 1, READY, "waiting")
        told = pair.run("gpu-worker", "stop")
        assert "2 requests in progress have at most 0.2 s" in told.stderr
        with pytest.raises(Unavailable, match="stopping"):
            list(stream)
    assert pair.worker.popen.wait(READY) == 0
    pair.start_worker()
    waiting.join(READY)
    assert handed_back == [expected]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_draining_worker_at_once(pair: Pair, number: int) -> None:
    pair.start_store()
    pair.start_worker()
    with WorkerClient(pair.worker_address, retry_for=0) as client:
        stream = client.generate(PROMPT, **LONG)
        next(stream)
        pair.worker.signal(number)
        eventually(lambda: not client.serving(), READY, "draining")
        started = time.monotonic()
        pair.worker.signal(number)
        pair.worker.popen.wait(READY)
        assert time.monotonic() - started < 10  # of the 30 s that the request may take
        with pytest.raises(Unavailable):
            list(stream)
    pair.start_worker()  # whatever was left is taken over
    assert pair.generate(PROMPT, 1).finish is not None


def test_ctrl_c_ends_a_request_and_nothing_else(pair: Pair) -> None:
    pair.start_store()
    pair.start_worker()
    command = (
        "generate",
        "--token-ids",
        "1,2",
        "--max-new-tokens",
        str(COUNT),
        "--samples",
        "32",
        "--ignore-eos",
    )
    asking = Process(pair.runtime, "gpu-worker", *command)
    eventually(lambda: pair.worker_stats().running == 1, READY, "the request")
    asking.signal(signal.SIGINT)
    assert asking.popen.wait(READY) == 128 + signal.SIGINT
    eventually(lambda: pair.worker_stats().running == 0, READY, "its end")
    assert "Traceback" not in asking.log.read_text()
    assert pair.worker_stats().requests_cancelled == 1
