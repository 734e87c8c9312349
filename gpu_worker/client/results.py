"""Whole answers, put together from the events of a stream. Used by both clients."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.errors import Unavailable
from common.rpc import gpu_worker_pb2 as pb


@dataclass
class Generated:
    """One continuation of a prompt."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: pb.Finish | None = None  # None until its end

    def add(self, event: pb.GenerateEvent) -> None:
        """`event` is of this continuation."""
        if event.HasField("finish"):
            self.finish = event.finish
        self.text += event.delta.text
        self.token_ids += [token.id for token in event.delta.tokens]
        self.logprobs += [token.logprob for token in event.delta.tokens]


class Answers:
    """All continuations that one request asks for, by their index."""

    def __init__(self, samples: int = 1) -> None:
        self._samples = [Generated(index) for index in range(max(1, samples))]

    def add(self, event: pb.GenerateEvent) -> None:
        self._samples[event.index].add(event)

    def complete(self) -> list[Generated]:
        """Each with its `finish`; Unavailable if the stream ended before."""
        if any(generated.finish is None for generated in self._samples):
            raise Unavailable("the stream ended without a result; the worker may have died")
        return self._samples
