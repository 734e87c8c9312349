"""What a worker and its store have told lately, and the rates between two of their answers.

Rates go by the worker's own clock. One thread may add while others read. Not done here: asking (`polling`),
drawing (`view`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from common.rpc import expert_store_pb2 as store_pb
from common.rpc import gpu_worker_pb2 as pb

KEPT = 600  # answers
_WINDOW = 10.0  # seconds that a hit rate is of


@dataclass(frozen=True)
class Answer:
    """What both said at one time; `store` is None if it did not answer."""

    worker: pb.WorkerStats
    store: store_pb.StoreStats | None


@dataclass(frozen=True)
class HitRates:
    """Of what was looked up in `seconds`; a layer that looked nothing up has none."""

    seconds: float
    layers: list[float | None]
    all: float | None


class History:
    """Owns the last answers; the newest is the one that is shown."""

    def __init__(self, model: pb.ModelInfoReply) -> None:
        self.model = model
        self._answers: deque[Answer] = deque(maxlen=KEPT)

    def add(self, answer: Answer) -> None:
        self._answers.append(answer)

    @property
    def newest(self) -> Answer:
        return self._answers[-1]

    def rates(self, count: Callable[[Answer], float | None], points: int) -> list[float]:
        """How fast a count has grown, per second, from answer to answer: the last `points`, newest last."""
        answers = list(self._answers)[-points - 1 :]
        rates = []
        for before, after in pairwise(answers):
            seconds = after.worker.uptime_seconds - before.worker.uptime_seconds
            first, last = count(before), count(after)
            grown = last - first if first is not None and last is not None else 0.0
            rates.append(max(0.0, grown) / seconds if seconds > 0 else 0.0)
        return rates

    def hit_rates(self) -> HitRates:
        """Of the last seconds, or since the worker's start if nothing was looked up in these."""
        newest = self.newest.worker
        since = next(
            (
                answer.worker
                for answer in list(self._answers)
                if newest.uptime_seconds - answer.worker.uptime_seconds <= _WINDOW
            ),
            newest,
        )
        lately = [
            (now.hits - then.hits, now.misses - then.misses)
            for now, then in zip(newest.layers, since.layers, strict=False)
        ]
        if any(map(sum, lately)):
            return _hit_rates(lately, newest.uptime_seconds - since.uptime_seconds)
        return _hit_rates([(layer.hits, layer.misses) for layer in newest.layers], newest.uptime_seconds)


def _hit_rates(counts: Sequence[tuple[int, int]], seconds: float) -> HitRates:
    layers = [_share(hits, misses) for hits, misses in counts]
    hits, misses = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return HitRates(seconds, layers, _share(hits, misses))


def _share(hits: int, misses: int) -> float | None:
    return hits / (hits + misses) if hits + misses else None
