"""The snapshots: a tree of chunks, each with its keys and values, some with the recurrent states after it.

    absent --store--> a chunk with states --evicted--> without --no snapshot behind it--> absent

A way from the root is a beginning of a prompt, so keys and values are kept once for all that share them. A
chunk is found by its tokens as a key of a dict, which compares them whatever their hash: another prompt's
states are never taken for these. Over the budget, the snapshot that was used longest ago goes first.
Not done here: which snapshots are worth their memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from gpu_worker.model.states import KeysValues, Recurrent, StatePools


@dataclass(eq=False)
class Chunk:
    """Tokens from one cut to the next, in the company of all before them."""

    parent: Chunk | None
    key: bytes
    start: int
    end: int
    context: KeysValues | None  # None at the root
    states: Recurrent | None = None
    children: dict[bytes, Chunk] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.context, self.states) if part is not None) + len(self.key)

    def way(self) -> list[Chunk]:
        """The chunks of the prompt up to this one, the last first."""
        way: list[Chunk] = []
        chunk = self
        while chunk.parent is not None:
            way.append(chunk)
            chunk = chunk.parent
        return way


@dataclass
class PrefixCounters:
    """Since the start: prompts looked up, those with a known beginning, tokens of these beginnings."""

    lookups: int = 0
    hits: int = 0
    saved_tokens: int = 0


class PrefixCache:
    """Owns the snapshots, which take no more than `budget` bytes; 0: there are none."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.counters = PrefixCounters()
        self.nbytes = 0
        self._root = Chunk(None, b"", 0, 0, None)
        self._used: dict[Chunk, None] = {}  # those with states; the one unused for longest comes first

    @property
    def snapshots(self) -> int:
        return len(self._used)

    def matching(self, tokens: Sequence[int], cuts: Sequence[int]) -> Chunk:
        """The last of the known chunks that the prompt begins with; the root if there is none."""
        chunk = self._root
        for cut in cuts:
            child = chunk.children.get(_key(tokens, chunk.end, cut))
            if child is None:
                break
            chunk = child
        return chunk

    def find(self, tokens: Sequence[int], cuts: Sequence[int]) -> Chunk | None:
        """The longest snapshot of a beginning of the prompt."""
        found = next((chunk for chunk in self.matching(tokens, cuts).way() if chunk.states is not None), None)
        if found is not None:
            self._touch(found)
        return found

    def count(self, saved_tokens: int) -> None:
        """A prompt has been looked up for a client."""
        self.counters.lookups += self.budget > 0
        self.counters.hits += saved_tokens > 0
        self.counters.saved_tokens += saved_tokens

    def store(self, tokens: Sequence[int], cuts: Sequence[int], pools: StatePools, place: int) -> None:
        """Keep a snapshot of the sequence at `place`, which has read the tokens up to the last cut, if the
        budget holds it."""
        chunk = self.matching(tokens, cuts)
        new = [cut for cut in cuts if cut > chunk.end]
        if new or chunk.states is None:
            needed = pools.recurrent_bytes + (cuts[-1] - chunk.end) * (pools.token_bytes + _ID_BYTES)
            if not self._make_room(needed, chunk.way()):
                return
            for cut in new:
                key = _key(tokens, chunk.end, cut)
                context = pools.read_context(place, chunk.end, cut)
                chunk.children[key] = Chunk(chunk, key, chunk.end, cut, context)
                chunk = chunk.children[key]
            chunk.states = pools.read_recurrent(place)
            self.nbytes += needed
        self._touch(chunk)

    def clear(self) -> None:
        """Forget all snapshots."""
        while self._used:
            self._evict(kept=())

    def check_integrity(self) -> None:
        """Conservation: every chunk leads to a snapshot, and all bytes are counted."""
        chunks = list(_below(self._root))
        assert {chunk for chunk in chunks if chunk.states is not None} == set(self._used)
        assert all(chunk.states is not None or chunk.children for chunk in chunks), "a chunk leads nowhere"
        assert all(chunk.parent is not None and chunk.start == chunk.parent.end for chunk in chunks)
        assert sum(chunk.nbytes for chunk in chunks) == self.nbytes <= self.budget, "bytes are miscounted"

    def _touch(self, chunk: Chunk) -> None:
        self._used.pop(chunk, None)
        self._used[chunk] = None

    def _make_room(self, needed: int, kept: Collection[Chunk]) -> bool:
        """Evict until so many bytes are free, but no chunk of `kept`; False if that is not to be had."""
        on_the_way = sum(len(chunk.key) + chunk.context.nbytes for chunk in kept if chunk.context is not None)
        if on_the_way + needed > self.budget:
            return False
        while self.nbytes + needed > self.budget:
            self._evict(kept)
        return True

    def _evict(self, kept: Collection[Chunk]) -> None:
        """The snapshot unused for longest, with the chunks that led to it alone."""
        chunk = next(iter(self._used))
        del self._used[chunk]
        assert chunk.states is not None
        self.nbytes -= chunk.states.nbytes
        chunk.states = None
        while chunk.states is None and not chunk.children and chunk.parent is not None and chunk not in kept:
            del chunk.parent.children[chunk.key]
            self.nbytes -= chunk.nbytes
            chunk = chunk.parent


_ID = "i"  # of an array: the model's vocabulary fits
_ID_BYTES = array(_ID).itemsize


def _key(tokens: Sequence[int], start: int, end: int) -> bytes:
    return array(_ID, tokens[start:end]).tobytes()


def _below(chunk: Chunk) -> Iterator[Chunk]:
    """All chunks behind one, without recursion: a long prompt has thousands in a row."""
    found = list(chunk.children.values())
    while found:
        chunk = found.pop()
        found += chunk.children.values()
        yield chunk
