"""The engine: model, pools and slot cache as one thing that takes steps. Used by one thread alone.

A step is one chunk of one sequence's prompt, or the next token of several sequences. Which step comes next
is the scheduler's choice; what a token becomes is the job's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gpu_worker.model.moe import RoutedExperts
from gpu_worker.model.nemotron_h import NemotronH
from gpu_worker.model.states import Recurrent, StatePools
from gpu_worker.prefix_cache.cuts import CutLaw
from gpu_worker.prefix_cache.tree import Chunk, PrefixCache
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.slots.hints import Prefetching

# Tokens in a chunk of a prompt, at most, and at least where a message of a chat ends. On a GPU nearly every
# expert comes over the link once a chunk, and what a chunk needs of memory is kept from the slots. On a CPU,
# so many tokens take longer to compute than all experts take to be read.
_CUT_LAWS = {"cpu": CutLaw(512, 64), "cuda": CutLaw(4096, 512)}
# Attention of a decode step looks at a context rounded up to this, so its shapes change rarely.
_CONTEXT_STEP = 256


def prefill_chunk(device: torch.device) -> int:
    """Tokens in a chunk of a prompt, at most."""
    return _CUT_LAWS[device.type].chunk


class CachedExperts(RoutedExperts, Protocol):
    """Routed experts with what is told and checked of their cache."""

    @property
    def hints(self) -> Prefetching:
        """What is fetched before it is needed."""

    @property
    def counters(self) -> CacheCounters:
        """Since the start."""

    @property
    def slots(self) -> int:
        """Slots in each layer; 0 where experts are computed from frames."""

    @property
    def pinned(self) -> int:
        """Slots in use by a step."""

    @property
    def nbytes(self) -> int:
        """Of memory that the cache takes."""

    def describe(self) -> str:
        """The policy in force."""

    def check_integrity(self) -> None:
        """To be called between steps."""


class Engine:
    """Runs steps; knows the places of the pools that are free."""

    launches_only = False  # whether decode returns while the device is still at it
    # Of the last decode, a row for each sequence: see `Sampler.choose`. For all at once it costs what it does
    # for one.
    best: Tensor | None = None

    def __init__(self, model: NemotronH, pools: StatePools, experts: CachedExperts) -> None:
        self.model, self.pools, self.experts = model, pools, experts
        self._free_places = list(range(pools.sequences))
        self._lengths = [0] * pools.sequences  # the host's copy: reading the device's would wait for it
        self.cut_law = _CUT_LAWS[pools.lengths.device.type]
        self.prefixes = PrefixCache(0)

    @property
    def prefill_chunk(self) -> int:
        return self.cut_law.chunk

    @property
    def free_places(self) -> int:
        return len(self._free_places)

    @property
    def max_context(self) -> int:
        return self.pools.max_context

    def take_place(self) -> int:
        """A place in the pools for a new sequence, as new."""
        return self._free_places.pop(0)

    def give_place(self, place: int) -> None:
        self.pools.reset(place)
        self._lengths[place] = 0
        self._free_places.append(place)

    def restore(self, place: int, snapshot: Chunk) -> None:
        """A place that is as new goes on from a snapshot."""
        assert snapshot.states is not None
        for chunk in snapshot.way():
            assert chunk.context is not None
            self.pools.write_context(place, chunk.start, chunk.context)
        self._go_on(place, snapshot.end, snapshot.states)

    def fork(self, source: int, target: int, length: int, states: Recurrent) -> None:
        """`target` goes on from the first tokens of the sequence at `source`, with the recurrent states that
        it had after them. It is as new, or `source` itself."""
        if source == target:
            self.pools.cut_context(source, length)
        else:
            self.pools.copy_context(source, target, length)
        self._go_on(target, length, states)

    def _go_on(self, place: int, length: int, states: Recurrent) -> None:
        self.pools.write_recurrent(place, states)
        self.pools.lengths[place] = self._lengths[place] = length

    def prefill(self, place: int, tokens: Sequence[int]) -> Tensor:
        """The next chunk of a prompt: at most `prefill_chunk` ids to hidden (t, hidden_size)."""
        assert 0 < len(tokens) <= self.prefill_chunk
        start = self._lengths[place]
        self._lengths[place] += len(tokens)
        ids = torch.tensor(tokens).to(self.pools.lengths.device, non_blocking=True)
        return self.model.prefill(ids, place, self.pools, start)

    def divide(self, count: int) -> list[int]:
        """The sizes of the steps in which so many sequences are to be decoded, once each."""
        return [count] if count else []

    def decode(self, places: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One token for each of several sequences: logits (b, vocab_size) float32."""
        for place in places:
            self._lengths[place] += 1
        longest = max(self._lengths[place] for place in places)
        context = min(-(-longest // _CONTEXT_STEP) * _CONTEXT_STEP, self.max_context)
        device = self.pools.lengths.device
        ids, rows = torch.tensor(tokens, device=device), torch.tensor(places, device=device)
        logits = self.logits(self.model.decode(ids, rows, self.pools, context))
        self.best = _best(logits)
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (rows, hidden_size) to logits (rows, vocab_size) float32."""
        return self.model.logits(hidden)

    def close(self) -> None:
        """Give back what outlives the engine's own memory; no step may follow."""

    def check_integrity(self) -> None:
        """Between requests: every place free, every slot accounted for."""
        assert sorted(self._free_places) == list(range(self.pools.sequences)), "a place is lost"
        assert not any(self._lengths), "a free place has a length"
        self.prefixes.check_integrity()
        self.experts.check_integrity()


def _best(logits: Tensor) -> Tensor:
    """logits (b, vocab) to the most probable tokens and their log-probabilities (b, 2) float64."""
    tokens = logits.argmax(-1, keepdim=True)
    return torch.cat([tokens.double(), logits.log_softmax(-1).gather(1, tokens).double()], dim=1)
