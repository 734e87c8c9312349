"""The fetcher against a store that loses, doubles, damages and delays what it is told and what it says."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from common.errors import CheckpointError, Exhausted, Unavailable
from common.expert_key import ExpertKey
from common.messages import Done, Failed, Fault, Kind, Malformed, Request, Staged, pack_reply
from gpu_worker.slots import fetch
from gpu_worker.slots.fetch import Fetcher

KEYS = [ExpertKey(0, expert) for expert in range(12)]


class FakeStore:
    """A ROUTER that answers as `answer` says: with any number of replies to each request."""

    def __init__(self, path: Path) -> None:
        self.pinned: set[ExpertKey] = set()
        self.staged: list[int] = []  # ids of STAGE requests, as they came
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self.endpoint = f"ipc://{path}"
        self._socket.bind(self.endpoint)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def answer(self, data: bytes) -> list[bytes]:
        try:
            request = Request.unpack(data)
        except Malformed as error:
            return [pack_reply(Failed(0, Fault.MALFORMED, str(error)))]
        if request.kind is Kind.STAGE:
            self.staged.append(request.request_id)
            self.pinned.add(request.keys[0])
            return [pack_reply(Staged(request.request_id))]
        if request.kind is Kind.RELEASE:
            self.pinned -= set(request.keys or self.pinned)
        return [pack_reply(Done(request.request_id))]

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        while not self._ended.is_set():
            if self._socket.poll(20):
                peer, data = self._socket.recv_multipart()
                for reply in self.answer(data):
                    self._socket.send_multipart([peer, reply])


class Lossy(FakeStore):
    """Requests and replies get lost, come twice, come late, and are cut short, each one time in six."""

    def __init__(self, path: Path, seed: int) -> None:
        self._draw = random.Random(seed)
        self._late: list[bytes] = []
        super().__init__(path)

    def answer(self, data: bytes) -> list[bytes]:
        replies = [reply for arrived in self._fate([data]) for reply in super(Lossy, self).answer(arrived)]
        held, self._late = self._late, []
        return [*self._fate(replies), *held]

    def _fate(self, messages: list[bytes]) -> list[bytes]:
        result = []
        for message in messages:
            fate = self._draw.choice(["lost", "twice", "late", "cut", "well", "well"])
            if fate == "late":
                self._late += [message] if len(messages) else []
            elif fate == "cut":
                result.append(message[: self._draw.randrange(len(message))])
            else:
                result += [message] * {"lost": 0, "twice": 2, "well": 1}[fate]
        return result


@contextmanager
def fetching(store: FakeStore) -> Iterator[Fetcher]:
    attachment: Any = SimpleNamespace(lease_id=7, data_endpoint=store.endpoint, arena=None)
    given_up: list[Any] = []
    link: Any = SimpleNamespace(
        attachment=attachment,
        wait_attached=lambda timeout: attachment,
        check_interrupted=lambda: None,
        give_up=given_up.append,
    )
    fetcher = Fetcher(link)
    try:
        yield fetcher
    finally:
        fetcher.close()
        store.close()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "ASK_AGAIN", 0.02)
    monkeypatch.setattr(fetch, "_POLL_MS", 5)


@pytest.mark.parametrize("seed", range(8))
def test_everything_comes_exactly_once_whatever_happens_to_messages(tmp_path: Path, seed: int) -> None:
    taken: list[ExpertKey] = []
    with fetching(Lossy(tmp_path / "data", seed)) as fetcher:
        for _ in range(3):
            fetcher.stage(KEYS, lambda arena, key: taken.append(key) is None)
    assert sorted(taken) == sorted(KEYS * 3)


def test_an_old_reply_answers_nothing_new(tmp_path: Path) -> None:
    """Ids are not used twice: a reply to a request of an earlier step must not stand for one of this step."""

    class Repeating(FakeStore):
        def answer(self, data: bytes) -> list[bytes]:
            past = [pack_reply(Staged(number)) for number in self.staged]
            return [*past, *super().answer(data)]

    store, ready = Repeating(tmp_path / "data"), []
    with fetching(store) as fetcher:
        for key in KEYS:
            fetcher.stage([key], lambda arena, key: ready.append(key in store.pinned) is None)
    assert ready == [True] * len(KEYS)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.UNREADABLE, CheckpointError),
        (Fault.NO_FRAME, Exhausted),
        (Fault.BUSY, Exhausted),
        (Fault.TOO_SLOW, Unavailable),
    ],
)
def test_what_the_store_says_went_wrong_is_told(tmp_path: Path, fault: Fault, error: type[Exception]) -> None:
    class Failing(FakeStore):
        def answer(self, data: bytes) -> list[bytes]:
            return [pack_reply(Failed(Request.unpack(data).request_id, fault, "so it is"))]

    with fetching(Failing(tmp_path / "data")) as fetcher, pytest.raises(error, match="so it is"):
        fetcher.stage(KEYS, lambda arena, key: True)


def test_a_store_that_never_answers_is_asked_again_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "FETCH_TIMEOUT", 0.3)

    class Silent(FakeStore):
        def answer(self, data: bytes) -> list[bytes]:
            super().answer(data)
            return []

    store = Silent(tmp_path / "data")
    with fetching(store) as fetcher, pytest.raises(Unavailable, match="did not stage"):
        fetcher.stage(KEYS[:1], lambda arena, key: True)
    assert len(store.staged) > 2
    assert set(store.staged) == {1}, "asked again under another id"
