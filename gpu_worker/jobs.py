"""Jobs: what one request makes of the engine's steps, from admission to its one ending.

    WAITING --begin--> PREFILL --prefill ... prefill--> DECODE --accept ... accept--> end

A `Generation` is a sequence in progress; a `Scoring` reads a text, which is all prefill. Both are driven by
the scheduler's thread, and speak through `emit`, which hands protocol messages to the event loop. Not done
here: which jobs take part in a step, and decoding, which is one step for many of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch
from torch import Tensor

from common.errors import InvalidRequest, ServingError
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.engine import Engine
from gpu_worker.model.part_times import PartTimes
from gpu_worker.protocol import cache_message, parts_message, token_message
from gpu_worker.sampling import Choice, Sampler, SamplingParams
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.stopping import StopMatcher
from gpu_worker.tokenizer import Tokenizer

Emit = Callable[[Any], None]

_LOGIT_ROWS = 128  # scored at a time: logits of a whole chunk take more memory than all the chunk's blocks


class NotFinite(ServingError):
    """A sequence's logits are no numbers: of a model or a prompt gone wrong, and of no other sequence."""

    status = grpc.StatusCode.INTERNAL


def check_tokens(ids: Sequence[int], vocab_size: int, longest: int) -> None:
    """Raises InvalidRequest unless `ids` is a prompt the model can read and still answer."""
    if not ids:
        raise InvalidRequest("the prompt is empty; give at least one token")
    bad = next((token for token in ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise InvalidRequest(f"token id {bad} is outside the vocabulary of {vocab_size}")
    if len(ids) > longest:
        raise InvalidRequest(
            f"the prompt has {len(ids)} tokens; this worker's context takes at most {longest}"
        )


class Job:
    """What generation and scoring share: a place in the pools, arrival and admission, cancellation."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.cancelled = False
        self.arrived = time.monotonic()
        self.begun = self.arrived
        self.place = -1
        self._counted = CacheCounters()
        self._timed = PartTimes()

    def begin(self, engine: Engine) -> None:
        self.begun = time.monotonic()
        self.place = engine.take_place()
        self._counted = engine.experts.counters.copy()
        self._timed = engine.model.times.copy()

    def end(self, engine: Engine) -> None:
        engine.give_place(self.place)

    def prefill(self, engine: Engine) -> bool:
        """Read one chunk; True when nothing is left to do."""
        raise NotImplementedError

    def counters(self, engine: Engine) -> tuple[pb.CacheCounters, pb.PartSeconds]:
        """What the cache did, and where the model's time went, since `begin`: for whatever ran meanwhile."""
        cache = engine.experts.counters.since(self._counted)
        return cache_message(cache), parts_message(engine.model.times.since(self._timed), cache)


class Generation(Job):
    """One sequence: its prompt enters chunk by chunk, then each step's logits become a token, until a reason
    to finish. The step after a token may be launched before `stream_chosen` tells it."""

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        eos_token_ids: Sequence[int],
        tokenizer: Tokenizer | None,
        emit: Emit,
    ) -> None:
        super().__init__(emit)
        self.prompt = list(prompt)
        self.params = params
        self.output: list[int] = []
        self._eos = () if params.ignore_eos else tuple(eos_token_ids)
        self._sampler = Sampler(params, self.prompt)
        self._text = _TextOut(tokenizer, params.stop)
        self._chosen: Choice | None = None  # the last token, until it is streamed
        self._fed = 0
        self._prefilled = 0.0

    @property
    def prompt_read(self) -> bool:
        return self._fed == len(self.prompt)

    def prefill(self, engine: Engine) -> bool:
        chunk = self.prompt[self._fed : self._fed + engine.prefill_chunk]
        hidden = engine.prefill(self.place, chunk)
        self._fed += len(chunk)
        if not self.prompt_read:
            return False
        logits = engine.logits(hidden[-1:])[0]
        self._prefilled = time.monotonic()
        return self.accept(engine, logits, None)

    def accept(self, engine: Engine, logits: Tensor, best: Tensor | None) -> bool:
        """Choose the next token from logits (vocab,), and stream it; True when it was the last.

        `best` as in `Sampler.choose`. Raises NotFinite. Streaming may wait for the next step to be launched,
        where nothing about it can end the sequence.
        """
        try:
            self._chosen = choice = self._sampler.choose(logits, best)
        except FloatingPointError as error:
            raise NotFinite(str(error)) from error
        self.output.append(choice.token)
        full = len(self.prompt) + len(self.output) > engine.max_context
        ended = choice.token in self._eos
        last = ended or full or len(self.output) >= self.params.max_new_tokens
        if engine.launches_only and not last and not self.params.stop:
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
        text, stopped = ("", False) if choice.token in self._eos else self._text.push(choice.token)
        self.emit(pb.GenerateEvent(delta=pb.Delta(text=text, tokens=[token_message(choice)])))
        return stopped

    def _finish(self, reason: str, engine: Engine) -> None:
        rest = self._text.flush() if reason != "stop" else ""
        if rest:
            self.emit(pb.GenerateEvent(delta=pb.Delta(text=rest)))
        now = time.monotonic()
        decoded, seconds = len(self.output) - 1, now - self._prefilled
        timings = pb.Timings(
            queue_ms=(self.begun - self.arrived) * 1e3,
            prefill_ms=(self._prefilled - self.begun) * 1e3,
            decode_ms=seconds * 1e3,
            tokens_per_second=decoded / seconds if decoded and seconds else 0.0,
        )
        usage = pb.Usage(prompt_tokens=len(self.prompt), completion_tokens=len(self.output))
        cache, parts = self.counters(engine)
        finish = pb.Finish(reason=reason, usage=usage, timings=timings, cache=cache, parts=parts)
        self.emit(pb.GenerateEvent(finish=finish))


class Scoring(Job):
    """Teacher-forced log-probabilities of a text, in windows that overlap by window - stride tokens.

    Every token after the first is scored once, in the window where it has the most context; a chunk is of one
    window.
    """

    def __init__(self, tokens: Sequence[int], window: int, stride: int, emit: Emit) -> None:
        super().__init__(emit)
        self.tokens = list(tokens)
        self.window, self.stride = window, stride
        self._start = 0  # of the current window
        self._fed = 0  # tokens of the current window already read
        self._scored = 1  # tokens whose log-probability is known; the first has none
        emit(pb.ScoreEvent(start=pb.ScoreStart(tokens=self.tokens)))

    def prefill(self, engine: Engine) -> bool:
        end = min(self._start + self.window, len(self.tokens))
        first = self._start + self._fed
        chunk = self.tokens[first : min(first + engine.prefill_chunk, end)]
        hidden = engine.prefill(self.place, chunk)
        self._fed += len(chunk)
        self._score(engine, hidden, first, end)
        if first + len(chunk) < end:
            return False
        if end == len(self.tokens):
            return True
        # Overlapping by one token at least: the first token of a window can only be scored in another.
        self._start, self._fed = min(self._start + self.stride, end - 1), 0
        engine.give_place(self.place)
        self.place = engine.take_place()
        return False

    def _score(self, engine: Engine, hidden: Tensor, first: int, end: int) -> None:
        """Score the tokens after each of the chunk's, as far as they are in the window and not yet scored."""
        skip = max(0, self._scored - (first + 1))
        last = min(first + hidden.shape[0], end - 1)  # position of the last token scored here
        if first + 1 + skip > last:
            return
        targets = torch.tensor(self.tokens[first + 1 + skip : last + 1], device=hidden.device)
        pieces = zip(hidden[skip:].split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=False)
        chosen = [_logprobs(engine.logits(rows[: len(ids)]), ids) for rows, ids in pieces]
        self._scored = last + 1
        self.emit(pb.ScoreEvent(piece=pb.ScorePiece(logprobs=torch.cat(chosen).tolist())))


def _logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Of one token in each row: logits (rows, vocab), targets (rows,) to (rows,)."""
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


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
