"""Choosing the next token of one sequence from its logits.

Semantics and order are those of Hugging Face's logits processors: repetition penalty over prompt and output,
temperature, then top-k, top-p and min-p. A sampler draws from a generator of its own, on the host, so that a
seed reproduces on every device and whatever else is being served. Stop strings are `stopping.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks of sampling; InvalidRequest names the field that is out of range."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int = 0

    def __post_init__(self) -> None:
        for name, (allowed, holds) in _RANGES.items():
            value = getattr(self, name)
            if not holds(value):
                raise InvalidRequest(f"{name} must be {allowed}, not {value!r}")


# Written so that NaN, which compares false with everything, is outside every range.
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a finite number of at least 0 (0: greedy)", lambda value: 0 <= value < math.inf),
    "top_k": ("at least 0 (0: off)", lambda value: value >= 0),
    "top_p": ("above 0 and at most 1 (1: off)", lambda value: 0 < value <= 1),
    "min_p": ("at least 0 (0: off) and below 1", lambda value: 0 <= value < 1),
    "repetition_penalty": ("from 0.01 to 100 (1: off)", lambda value: 0.01 <= value <= 100),
    "seed": ("an unsigned 64-bit number", lambda value: value is None or 0 <= value < 1 << 64),
    "max_new_tokens": ("at least 1", lambda value: value >= 1),
    "stop": (
        f"at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters",
        lambda value: len(value) <= MAX_STOP_STRINGS and all(0 < len(s) <= MAX_STOP_LENGTH for s in value),
    ),
    "logprobs": (f"from 0 to {MAX_LOGPROBS}", lambda value: 0 <= value <= MAX_LOGPROBS),
}


class Choice(NamedTuple):
    """A chosen token; log-probabilities are the model's own, before penalty, temperature and cuts."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]  # the most probable tokens, best first


class Sampler:
    """Chooses the tokens of one sequence and remembers them for the repetition penalty.

    `index`: of the sample. Each draws from a stream of its own, the first from that of the seed itself.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], index: int = 0) -> None:
        self.params = params
        self._prompt = prompt
        self._seen: Tensor | None = None  # (vocab,) bool, on the logits' device
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(stream_seed(params.seed, index))

    def choose(self, logits: Tensor, best: Tensor | None = None) -> Choice:
        """The next token from logits (vocab,) float32. Raises FloatingPointError if they are not finite.

        `best` (2,), if known already: the most probable token and its log-probability, finite if logits are.
        """
        params = self.params
        if best is not None and (params.temperature, params.repetition_penalty, params.logprobs) == (0, 1, 0):
            chosen, logprob = best.tolist()
            return Choice(int(chosen), _finite(logprob), ())
        logprobs = logits.log_softmax(-1)
        scores = self._penalised(logits.double())
        token = scores.argmax(0, keepdim=True) if self.params.temperature == 0 else self._draw(scores)
        top = logprobs.topk(min(self.params.logprobs, len(logprobs)))
        # All in one transfer: on a GPU each waits for the device, and between waits the device does nothing.
        told = (
            token,
            logprobs.max(0, keepdim=True).values,
            logprobs.gather(0, token),
            top.indices,
            top.values,
        )
        chosen, largest, logprob, *tops = torch.cat([part.double() for part in told]).tolist()
        _finite(largest)
        if self._seen is not None:
            self._seen.index_fill_(0, token, True)
        alternatives = zip(map(int, tops), tops[len(tops) // 2 :], strict=False)
        return Choice(int(chosen), logprob, tuple(alternatives))

    def _penalised(self, scores: Tensor) -> Tensor:
        if self.params.repetition_penalty == 1:
            return scores
        if self._seen is None:
            self._seen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
            self._seen[torch.tensor(self._prompt, dtype=torch.int64, device=scores.device)] = True
        return penalise(scores, self._seen, self.params.repetition_penalty)

    def _draw(self, scores: Tensor) -> Tensor:
        uniform = float(torch.rand((), dtype=torch.float64, generator=self._generator))
        return pick(warp(scores, self.params).softmax(-1), uniform)


def stream_seed(seed: int, index: int) -> int:
    """The seed of a request's `index`-th sample; hashed, since seeds one apart are likely to be asked for."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little")


def _finite(logprob: float) -> float:
    if not math.isfinite(logprob):
        raise FloatingPointError("the model's logits are not finite, so no token can be chosen from them")
    return logprob


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores (vocab,) with those where `seen` (vocab,) bool moved down by a factor, whatever their sign."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def warp(scores: Tensor, params: SamplingParams) -> Tensor:
    """Scores (vocab,) over the temperature (> 0), with everything outside top-k, top-p and min-p at -inf."""
    # Shifted first: a tiny temperature then sends all but the best to -inf, instead of the best to inf.
    scores = (scores - scores.max()) / params.temperature
    if params.top_k > 0:
        worst_kept = scores.topk(min(params.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < worst_kept, -torch.inf)
    if params.top_p < 1:
        ascending, order = scores.sort(stable=True)
        cut = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p
        cut[-1] = False
        scores = scores.masked_fill(torch.zeros_like(cut).scatter(0, order, cut), -torch.inf)
    if params.min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < params.min_p * probabilities.max(), -torch.inf)
    return scores


def pick(probabilities: Tensor, uniform: float) -> Tensor:
    """The token (1,) at which the cumulative distribution passes `uniform` in [0, 1 - 2^-53], in float64."""
    cumulative = probabilities.cumsum(-1)
    # Times the sum as rounded, which no such `uniform` reaches, lest the target lie behind the last token;
    # `right`, so that a token of probability 0, whose step has no width, is never met.
    token = torch.searchsorted(cumulative, uniform * cumulative[-1:], right=True)
    return token.clamp(max=len(cumulative) - 1)  # where sums are no numbers, it lies behind the last token
