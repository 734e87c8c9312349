"""What is shown while a worker is being asked: never a history without an answer."""

from __future__ import annotations

import pytest

from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.top import polling
from gpu_worker.top.polling import Polling


class Restarting:
    """A client of a worker that has begun anew each time it is asked."""

    address = "here"

    def __init__(self) -> None:
        self.asked = 0

    def stats(self) -> pb.WorkerStats:
        self.asked += 1
        return pb.WorkerStats(uptime_seconds=100.0 * self.asked)

    def model_info(self) -> pb.ModelInfoReply:
        return pb.ModelInfoReply(model=f"{self.asked}")


def test_a_history_is_shown_with_its_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Polling(Restarting(), 1.0)  # type: ignore[arg-type]
    shown: list[float | None] = []

    def ask_store(address: str) -> None:  # meanwhile another thread draws
        history, _ = asking.latest()
        shown.append(None if history is None else history.newest.worker.uptime_seconds)

    monkeypatch.setattr(polling, "_ask_store", ask_store)
    for _ in range(3):
        asking.ask()
    history, problem = asking.latest()
    assert shown == [None, 100.0, 200.0] and not problem
    assert history is not None and history.model.model == "3"
