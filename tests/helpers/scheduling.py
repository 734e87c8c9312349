"""A scheduler over a real engine whose steps a test notes, and whose steps a test can act in.

Events are told by the names of those who took part: "p:a" is a chunk of a's prompt, "d:ab" a step of decode,
"t:a" a token that was streamed, "f:a" the end of a stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from common.errors import ServingError
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.engine import Engine
from gpu_worker.jobs import Generation, Job, Scoring
from gpu_worker.sampling import SamplingParams
from gpu_worker.scheduler import Scheduler

WAIT = 60.0  # seconds; far more than anything here takes


class Request:
    """One job and all that became of it."""

    def __init__(self, name: str, changed: threading.Condition) -> None:
        self.name, self.job = name, Job(emit=print)
        self.messages: list[Any] = []
        self.endings: list[BaseException | None] = []
        self._changed = changed

    def on_end(self, error: BaseException | None) -> None:
        with self._changed:
            self.endings.append(error)
            self._changed.notify_all()

    def cancel(self) -> None:
        self.job.cancelled = True

    def ending(self) -> BaseException | None:
        """Waits for it."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.endings, WAIT), f"{self.name} did not end"
        assert len(self.endings) == 1
        return self.endings[0]

    def tokens(self) -> list[int]:
        """What was streamed, once it has ended well."""
        assert self.ending() is None
        return [token.id for token in self.streamed]

    def samples(self) -> list[list[int]]:
        """What was streamed under each index, once it has ended well; the last of each is its finish."""
        assert self.ending() is None
        by_index: dict[int, list[pb.GenerateEvent]] = {}
        for message in self.messages:
            by_index.setdefault(message.index, []).append(message)
        for events in by_index.values():
            assert [event.HasField("finish") for event in events] == [False] * (len(events) - 1) + [True]
        return [
            [token.id for event in events for token in event.delta.tokens]
            for _, events in sorted(by_index.items())
        ]

    @property
    def streamed(self) -> list[pb.Token]:
        deltas = [message.delta for message in self.messages if isinstance(message, pb.GenerateEvent)]
        return [token for delta in deltas for token in delta.tokens]

    @property
    def finish(self) -> pb.Finish:
        return self.messages[-1].finish

    @property
    def places(self) -> list[int]:
        """Those that it has now."""
        samples = self.job.running if isinstance(self.job, Generation) else []
        return [place for place in (self.job.place, *(sample.place for sample in samples)) if place >= 0]

    @property
    def output(self) -> list[int]:
        """Of its first sample, streamed or not."""
        assert isinstance(self.job, Generation)
        return self.job.samples[0].output


class Served:
    """Notes what the engine does; `at` are actions by the number of the step that they belong to, on the
    engine's thread, before the step."""

    def __init__(self, engine: Engine, scheduler: Scheduler, fatal: list[BaseException]) -> None:
        self.engine, self.scheduler, self.fatal = engine, scheduler, fatal
        self.events: list[str] = []
        self.at: dict[int, Callable[[], object]] = {}
        self.requests: list[Request] = []
        self.eos: tuple[int, ...] = ()  # of requests to come
        self._changed = threading.Condition()

    @property
    def steps(self) -> list[str]:
        """The events that are the engine's."""
        return [event for event in self.events if event[0] in "pd"]

    def generate(
        self, name: str, prompt: Sequence[int], samples: int = 1, priority: int = 0, **sampling: Any
    ) -> Request:
        """Raises what the scheduler raises."""
        request = Request(name, self._changed)

        def emit(event: pb.GenerateEvent) -> None:
            request.messages.append(event)
            self.events.append(f"{'f' if event.HasField('finish') else 't'}:{name}")

        request.job = Generation(prompt, SamplingParams(**sampling), self.eos, None, emit, samples, priority)
        return self._submit(request)

    def score(self, name: str, tokens: Sequence[int], window: int, stride: int) -> Request:
        request = Request(name, self._changed)
        request.job = Scoring(tokens, window, stride, request.messages.append)
        return self._submit(request)

    def _submit(self, request: Request) -> Request:
        self.requests.append(request)
        try:
            self.scheduler.submit(request.job, request.on_end)
        except ServingError:
            self.requests.remove(request)
            raise
        return request

    def wait_for(self, requests: int) -> None:
        """Until so many were submitted, and all of them have ended."""
        with self._changed:
            ended = self._changed.wait_for(
                lambda: len(self.requests) >= requests and all(r.endings for r in self.requests), WAIT
            )
        assert ended, f"after {self.steps[-5:]}: {[r.name for r in self.requests if not r.endings]}"

    def idle(self) -> None:
        """Until the answers of requests that have ended are read for their next turns."""
        deadline = time.monotonic() + WAIT
        while self.scheduler._next_turns:
            assert time.monotonic() < deadline, "the scheduler does not come to rest"
            time.sleep(0.01)

    def note(self, kind: str, places: Sequence[int]) -> None:
        if action := self.at.pop(len(self.steps), None):
            action()
        owners = [r.name for r in self.requests for place in r.places if place in places and not r.endings]
        self.events.append(f"{kind}:{''.join(sorted(owners))}")


@contextmanager
def serving(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, max_queue: int = 100, budget: int | None = None
) -> Iterator[Served]:
    """Not started yet, so that what is submitted first arrives at once; stopped at the end of the block."""
    fatal: list[BaseException] = []
    served = Served(engine, Scheduler(engine, max_queue, fatal.append, budget), fatal)
    prefill, decode = engine.prefill, engine.decode

    def noted_prefill(place: int, tokens: Sequence[int]) -> Tensor:
        served.note("p", [place])
        return prefill(place, tokens)

    def noted_decode(places: Sequence[int], tokens: Sequence[int]) -> Tensor:
        served.note("d", places)
        return decode(places, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "prefill", noted_prefill)
        patch.setattr(engine, "decode", noted_decode)
        try:
            yield served
        finally:
            assert served.scheduler.stop(WAIT)
