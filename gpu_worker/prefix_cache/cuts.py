"""Where a prompt is cut into chunks: a law of its tokens and the kind of device, and of nothing else.

Whether there is a cut after a token depends on that token and those before it alone, so prompts that begin
alike are cut alike as far as they are alike, and a state at a cut serves them all. The package says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CutLaw:
    """`turn_ends`: tokens that end a message of a chat."""

    chunk: int  # tokens from one cut to the next at most
    least: int  # and at least, where it is the end of a turn that invites one
    turn_ends: frozenset[int] = frozenset()

    def cuts(self, tokens: Sequence[int]) -> list[int]:
        """The cuts of a prompt in order, as numbers of tokens before them; its end is one only by chance."""
        cuts, last = [], 0
        for end in [at for at, token in enumerate(tokens, 1) if token in self.turn_ends]:
            cuts += (full := list(range(last + self.chunk, end, self.chunk)))
            last = full[-1] if full else last
            if end - last >= min(self.least, self.chunk):
                cuts.append(end)
                last = end
        return [*cuts, *range(last + self.chunk, len(tokens) + 1, self.chunk)]
