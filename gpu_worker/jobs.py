"""Jobs: what one request makes of the engine's steps, from admission to its one ending.

    WAITING --begin--> PREFILL --prefill ... prefill--> SAMPLES, decoding --> end

A `Generation` reads its prompt once and has one or several samples go on from there; a `Scoring` reads a
text, which is all prefill. Both are driven by the scheduler's thread, and speak through `emit`, which hands
protocol messages to the event loop. Not done here: which jobs take part in a step, and decoding, which is one
step for many samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from common import origin
from common.errors import InvalidRequest
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.engine import Engine
from gpu_worker.model.part_times import PartTimes
from gpu_worker.model.states import KeysValues, Recurrent
from gpu_worker.prefix_cache.reading import PromptReading
from gpu_worker.protocol import cache_message, parts_message
from gpu_worker.samples import Sample
from gpu_worker.sampling import SamplingParams
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.tokenizer import Tokenizer

Emit = Callable[[Any], None]

_LOGIT_ROWS = 128  # scored at a time: logits of a whole chunk take more memory than all the chunk's blocks


MOST_SCORED = 1 << 20  # tokens of one text: all of them are in memory until it ends


def check_length(count: int, max_context: int, longest: int) -> None:
    """Raises InvalidRequest for a prompt that the model cannot read and still answer.

    longest: what the model takes, where the worker may have been started with less.
    """
    if count > max_context:
        larger = ", or start the worker with a larger --max-context" if max_context < longest else ""
        raise InvalidRequest(
            f"the prompt has {count} tokens; this worker's context takes at most {max_context}: "
            f"shorten it{larger}"
        )


def check_scored_length(count: int) -> None:
    """Raises InvalidRequest for a text too long to be scored at a time."""
    if count > MOST_SCORED:
        raise InvalidRequest(
            f"the text has {count} tokens; at most {MOST_SCORED} are scored in one request: divide it"
        )


def check_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest unless there are tokens, and all are of the model."""
    if not ids:
        raise InvalidRequest("the prompt is empty; give at least one token")
    if min(ids) < 0 or max(ids) >= vocab_size:
        bad = next(token for token in ids if not 0 <= token < vocab_size)
        raise InvalidRequest(f"token id {bad} is outside the vocabulary of {vocab_size}")


class Job:
    """What all share: places in the pools, arrival and admission, cancellation."""

    priority = 0  # those who wait and have more are admitted first

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.origin = origin.current()
        self.cancelled = False
        self.arrived = time.monotonic()
        self.begun = 0.0  # 0: not yet
        self.place = -1
        self._counted = CacheCounters()
        self._timed = PartTimes()

    def begin(self, engine: Engine) -> None:
        self.begun = time.monotonic()
        self.place = engine.take_place()
        self._counted = engine.experts.counters.copy()
        self._timed = engine.model.times.copy()

    def end(self, engine: Engine) -> None:
        """Give back all places."""
        if self.place >= 0:
            engine.give_place(self.place)

    def prefill(self, engine: Engine) -> bool:
        """Read one chunk; True when it was the last."""
        raise NotImplementedError

    def counters(self, engine: Engine) -> tuple[pb.CacheCounters, pb.PartSeconds]:
        """What the cache did, and where the model's time went, since `begin`: for whatever ran meanwhile."""
        cache = engine.experts.counters.since(self._counted)
        return cache_message(cache), parts_message(engine.model.times.since(self._timed), cache)


class Generation(Job):
    """A prompt and its samples. Once it is read, each sample goes on from its end, at once or later.

    The first sample takes the prompt's own place. What later ones need of the prompt is a copy of its
    recurrent states on the host, of fixed size, and its keys and values, which decoding leaves as they are at
    the place of any sample that runs: so the last place of a request is kept until its last sample has begun,
    or `set_aside` copies them to the host.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        eos_token_ids: Sequence[int],
        tokenizer: Tokenizer | None,
        emit: Emit,
        samples: int = 1,
        priority: int = 0,
    ) -> None:
        super().__init__(emit)
        self.prompt, self.params, self.tokenizer = list(prompt), params, tokenizer
        self.eos = () if params.ignore_eos else tuple(eos_token_ids)
        self.samples: list[Sample] = []  # that have begun
        self.running: list[Sample] = []  # of these
        self.aside = False  # whether it has begun and has no place
        self.priority = priority
        self._count = samples
        self._reading: PromptReading | None = None
        self._prefilled = 0.0
        self._logits: Tensor | None = None  # after the prompt, (vocab,)
        self._states: Recurrent | None = None  # likewise, where there will be a second sample
        self._context: KeysValues | None = None  # of the prompt, once the request was set aside

    @property
    def completion_tokens(self) -> int:
        return sum(len(sample.output) for sample in self.samples)

    @property
    def prompt_state_bytes(self) -> int:
        """Of host memory, for samples that have not begun."""
        return sum(part.nbytes for part in (self._states, self._context) if part is not None)

    @property
    def prompt_tokens_read(self) -> int:
        return self._reading.fed if self._reading is not None else 0

    @property
    def prompt_read(self) -> bool:
        return self._reading is not None and self._reading.done

    @property
    def more(self) -> bool:
        """Whether there are samples that have not begun."""
        return len(self.samples) < self._count

    @property
    def done(self) -> bool:
        return self.prompt_read and not self.running and not self.more

    def begin(self, engine: Engine) -> None:
        super().begin(engine)
        self._reading = PromptReading(engine, self.place, self.prompt)
        engine.prefixes.count(self._reading.cached)

    def prefill(self, engine: Engine) -> bool:
        assert self._reading is not None
        hidden = self._reading.step()
        if not self._reading.done:
            return False
        self._logits = engine.logits(hidden[-1:])[0]
        if self._count > 1:
            self._states = engine.pools.read_recurrent(self.place)
        self._prefilled = time.monotonic()
        return True

    def next_sample(self, engine: Engine) -> bool:
        """Begin it, at the place that the request keeps or else a new one; True when it has ended already."""
        assert self._logits is not None
        place, self.place = self.place, -1
        if self.samples:
            place = self._return_to_prompt(place, engine)
        sample = Sample(self, len(self.samples), place)
        self.samples.append(sample)
        self.running.append(sample)
        logits = self._logits
        if not self.more:
            self._logits = self._states = self._context = None
        return sample.accept(engine, logits, None)

    def _return_to_prompt(self, place: int, engine: Engine) -> int:
        """A place that is as after the prompt: this one if there is one (not -1), else a new one."""
        assert self._states is not None
        source = place
        if place < 0:
            place = engine.take_place()
            source = self.running[0].place if self.running else place
        if self.aside:
            assert self._context is not None
            engine.pools.write_context(place, 0, self._context)
        engine.fork(source, place, len(self.prompt), self._states)
        self.aside = False
        return place

    def set_aside(self, engine: Engine) -> None:
        """Give back the place that is kept for the next sample, which then takes any."""
        if self._context is None:
            self._context = engine.pools.read_context(self.place, 0, len(self.prompt))
        engine.give_place(self.place)
        self.place, self.aside = -1, True

    def end_sample(self, sample: Sample, engine: Engine) -> None:
        """Its place is free, unless a later sample needs what is there."""
        self.running.remove(sample)
        if self.running or not self.more:
            engine.give_place(sample.place)
        else:
            self.place = sample.place

    def end(self, engine: Engine) -> None:
        super().end(engine)
        for sample in self.running:
            engine.give_place(sample.place)

    def finish(self, engine: Engine) -> pb.Finish:
        """What all its samples' endings have in common."""
        assert self._reading is not None
        timings = pb.Timings(
            queue_ms=(self.begun - self.arrived) * 1e3, prefill_ms=(self._prefilled - self.begun) * 1e3
        )
        usage = pb.Usage(prompt_tokens=len(self.prompt), cached_prompt_tokens=self._reading.cached)
        cache, parts = self.counters(engine)
        return pb.Finish(usage=usage, timings=timings, cache=cache, parts=parts)


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
        self.scored = 1  # tokens whose log-probability is known; the first has none
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
        skip = max(0, self.scored - (first + 1))
        last = min(first + hidden.shape[0], end - 1)  # position of the last token scored here
        if first + 1 + skip > last:
            return
        targets = torch.tensor(self.tokens[first + 1 + skip : last + 1], device=hidden.device)
        pieces = zip(hidden[skip:].split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=False)
        chosen = [_logprobs(engine.logits(rows[: len(ids)]), ids) for rows, ids in pieces]
        self.scored = last + 1
        self.emit(pb.ScoreEvent(piece=pb.ScorePiece(logprobs=torch.cat(chosen).tolist())))


def _logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Of one token in each row: logits (rows, vocab), targets (rows,) to (rows,)."""
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
