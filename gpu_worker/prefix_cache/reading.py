"""One prompt on its way into a place: what is known of it is put there, the rest is read chunk by chunk.

Of the cuts that it passes, a few leave a snapshot: the first, where a system prompt ends that others share;
the last two, since the next turn of a chat goes on from the last, and another answer to this turn from the
one before; and the last that an earlier prompt had too, where more may part ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from gpu_worker.engine import Engine


class PromptReading:
    """Of `tokens` into `place`, which is as new."""

    def __init__(self, engine: Engine, place: int, tokens: Sequence[int]) -> None:
        self._engine, self._place, self._tokens = engine, place, tokens
        self._cuts = engine.cut_law.cuts(tokens)
        # The last token is always read, for the logits after it.
        before_last = [cut for cut in self._cuts if cut < len(tokens)]
        known = engine.prefixes.matching(tokens, self._cuts).end
        self._kept = {known, *self._cuts[:1], *self._cuts[-2:]}
        snapshot = engine.prefixes.find(tokens, before_last)
        if snapshot is not None:
            engine.restore(place, snapshot)
        self.cached = self.fed = 0 if snapshot is None else snapshot.end  # tokens

    @property
    def done(self) -> bool:
        return self.fed == len(self._tokens)

    def step(self) -> Tensor:
        """Read the next chunk: hidden (t, hidden_size)."""
        engine, tokens = self._engine, self._tokens
        end = next((cut for cut in self._cuts if cut > self.fed), len(tokens))
        hidden = engine.prefill(self._place, tokens[self.fed : end])
        self.fed = end
        if end in self._kept:
            engine.prefixes.store(
                tokens, [cut for cut in self._cuts if cut <= end], engine.pools, self._place
            )
        return hidden
