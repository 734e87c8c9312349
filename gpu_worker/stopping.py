"""Stop strings in a stream of text: nothing of one is ever shown, however the text is cut into pieces.

The match that is complete first wins; of two that end together, the one that began earlier. So the outcome is
that of reading one character at a time, and generation ends as soon as it can. Text only: tokens become text
in `tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string matches everywhere"
        self._stop = tuple(stop)
        self._longest_part = max(map(len, stop), default=1) - 1
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may now be shown, and whether a stop string has ended it."""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        kept = len(text) - self._partial(text)
        self._held = text[kept:]
        return text[:kept], False

    def flush(self) -> str:
        """What was held back, once it is known that nothing follows."""
        text, self._held = self._held, ""
        return text

    def _partial(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        lengths = range(min(self._longest_part, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
