"""A sample: one continuation of a prompt, from the logits after the prompt to its own ending.

A request has one or several, each at a place of its own and each streamed under its index. Not done here:
where the states at the place come from (`jobs`), and which samples take part in a step (`scheduler`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from torch import Tensor

from common.errors import ServingError
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.engine import Engine
from gpu_worker.protocol import token_message
from gpu_worker.sampling import Choice, Sampler
from gpu_worker.stopping import StopMatcher
from gpu_worker.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpu_worker.jobs import Generation


class NotFinite(ServingError):
    """A sequence's logits are no numbers: of a model or a prompt gone wrong, and of no other sequence."""

    status = grpc.StatusCode.INTERNAL


class Sample:
    """Each step's logits become a token, until a reason to finish. The step after a token may be launched
    before `stream_chosen` tells it."""

    def __init__(self, request: Generation, index: int, place: int) -> None:
        self.request, self.index, self.place = request, index, place
        self.output: list[int] = []
        self._sampler = Sampler(request.params, request.prompt, index)
        self._text = _TextOut(request.tokenizer, request.params.stop)
        self._chosen: Choice | None = None  # the last token, until it is streamed
        self._begun = time.monotonic()

    @property
    def tokens_per_second(self) -> float:
        """Of decode so far; the first token is prefill's."""
        decoded, seconds = len(self.output) - 1, time.monotonic() - self._begun
        return decoded / seconds if decoded > 0 and seconds else 0.0

    def accept(self, engine: Engine, logits: Tensor, best: Tensor | None) -> bool:
        """Choose the next token from logits (vocab,), and stream it; True when it was the last.

        `best` as in `Sampler.choose`. Raises NotFinite. Streaming may wait for the next step to be launched,
        where nothing about it can end the sequence.
        """
        params = self.request.params
        try:
            self._chosen = choice = self._sampler.choose(logits, best)
        except FloatingPointError as error:
            engine.prefixes.clear()  # should it come from a snapshot, it must not come back
            raise NotFinite(str(error)) from error
        self.output.append(choice.token)
        full = len(self.request.prompt) + len(self.output) > engine.max_context
        ended = choice.token in self.request.eos
        last = ended or full or len(self.output) >= params.max_new_tokens
        if engine.launches_only and not last and not params.stop:
            return False
        stopped = self.stream_chosen()
        if stopped or last:
            self._finish("stop" if stopped else "eos" if ended else "length", engine)
        return stopped or last

    def stream_chosen(self) -> bool:
        """Stream the token chosen last, unless that was done; whether its text completes a stop string."""
        choice, self._chosen = self._chosen, None
        if choice is None:
            return False
        text, stopped = ("", False) if choice.token in self.request.eos else self._text.push(choice.token)
        tokenizer = self.request.tokenizer if self.request.params.logprobs else None
        token = token_message(choice, tokenizer)
        self.request.emit(pb.GenerateEvent(delta=pb.Delta(text=text, tokens=[token]), index=self.index))
        return stopped

    def _finish(self, reason: str, engine: Engine) -> None:
        rest = self._text.flush() if reason != "stop" else ""
        if rest:
            self.request.emit(pb.GenerateEvent(delta=pb.Delta(text=rest), index=self.index))
        finish = self.request.finish(engine)
        finish.reason = reason
        finish.usage.completion_tokens = len(self.output)
        finish.timings.decode_ms = (time.monotonic() - self._begun) * 1e3
        finish.timings.tokens_per_second = self.tokens_per_second
        self.request.emit(pb.GenerateEvent(finish=finish, index=self.index))


@dataclass
class _TextOut:
    """Token ids to text that may be shown: whole characters, stop strings cut; nothing without tokenizer."""

    tokenizer: Tokenizer | None
    stop: tuple[str, ...]
    _stream: Any = field(init=False)
    _matcher: StopMatcher = field(init=False)

    def __post_init__(self) -> None:
        self._stream = self.tokenizer.stream() if self.tokenizer else None
        self._matcher = StopMatcher(self.stop)

    def push(self, token: int) -> tuple[str, bool]:
        if self._stream is None:
            return "", False
        return self._matcher.push(self._stream.push(token))

    def flush(self) -> str:
        if self._stream is None:
            return ""
        text, stopped = self._matcher.push(self._stream.flush())
        return text if stopped else text + self._matcher.flush()
