"""Requests of one client, timed by its own clock, and what decoding alone cost of them.

A worker's counters are those of a whole request. So every prompt is sent twice: for one token, which comes
out of prefill, and for many. The same prompt needs the same experts, and on a GPU prompts leave slots alone
that are full: the difference is what the tokens after the first did.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gpu_driver import device_bytes
from pair import Pair

from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.client import Generated


@dataclass(frozen=True)
class Request:
    """One answer, as its client saw it."""

    finish: pb.Finish
    token_ids: list[int]
    first: float  # seconds from asking to the first token
    between: list[float]  # seconds from each token to the next

    @property
    def prefill_rate(self) -> float:
        """Tokens a second, by the worker's clock."""
        return self.finish.usage.prompt_tokens / self.finish.timings.prefill_ms * 1e3


@dataclass(frozen=True)
class Decoded:
    """What the tokens after the first took, of one prompt."""

    tokens: int
    seconds: float  # by the worker's clock
    hits: int
    misses: int
    on_cpu: int  # of the misses
    bytes_moved: int
    guesses: int  # experts copied ahead of their layer's choice
    useful: int  # and then chosen


@dataclass(frozen=True)
class Run:
    """A prompt asked for twice."""

    short: Request  # one token
    long: Request
    decoded: Decoded
    device_bytes: int | None  # as the driver says, after both


def request(pair: Pair, prompt: Sequence[int], new: int) -> Request:
    """Exactly `new` tokens, greedily; raises what the client raises."""
    generated, arrivals, asked = Generated(), list[float](), time.perf_counter()
    for event in pair.client.generate(prompt, max_new_tokens=new, ignore_eos=True):
        arrivals += [time.perf_counter()] * len(event.delta.tokens)
        generated.add(event)
    assert generated.finish is not None and len(arrivals) == new
    between = [later - earlier for earlier, later in pairwise(arrivals)]
    return Request(generated.finish, generated.token_ids, arrivals[0] - asked, between)


def run(pair: Pair, prompt: Sequence[int], new: int) -> Run:
    """One token, then `new` of them, after the same prompt."""
    short, before = request(pair, prompt, 1), pair.client.stats()
    long, after = request(pair, prompt, new), pair.client.stats()
    assert long.token_ids[0] == short.token_ids[0], "the same prompt was answered in two ways"
    return Run(short, long, decoded(short.finish, long.finish, before, after), device_bytes())


def decoded(short: pb.Finish, long: pb.Finish, before: pb.WorkerStats, after: pb.WorkerStats) -> Decoded:
    """The difference of two requests; `before` and `after` the longer one, for guesses are counted there."""
    return Decoded(
        tokens=long.usage.completion_tokens - 1,
        seconds=long.timings.decode_ms / 1e3,
        hits=long.cache.hits - short.cache.hits,
        misses=long.cache.misses - short.cache.misses,
        on_cpu=long.cache.misses_on_cpu - short.cache.misses_on_cpu,
        bytes_moved=long.cache.bytes_fetched - short.cache.bytes_fetched,
        guesses=after.hints_sent - before.hints_sent,
        useful=after.hints_useful - before.hints_useful,
    )


def digest(runs: Sequence[Run]) -> str:
    """Of all tokens: equal wherever the same prompts were answered alike."""
    tokens = [answer.long.token_ids for answer in runs]
    return hashlib.sha256(repr(tokens).encode()).hexdigest()[:8]
