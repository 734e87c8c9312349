"""Answers read as a part of the next prompt before that arrives, while there is nothing else to do.

A chat goes on with the last prompt, the answer and a new message. Reading the answer now leaves the snapshot
at its end that the next turn would have left, so that turn begins there; if the chat does not go on, idle
time was spent. Whoever arrives meanwhile waits for the end of a chunk, as beside any prompt.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from common.errors import ServingError
from gpu_worker.prefix_cache.reading import PromptReading

if TYPE_CHECKING:
    from gpu_worker.engine import Engine

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.2  # with nothing to do, before an answer is read; programs take less for the next request
_MOST = 8  # that wait to be read; the oldest are forgotten


class NextTurns:
    """Used by the engine's thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._chats: deque[list[int]] = deque(maxlen=_MOST)
        self.places = 0  # taken, for no longer than a chunk once somebody else wants one

    def __len__(self) -> int:
        return len(self._chats)

    def note(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """An answer has ended; it will be read if it ends a turn, and behind it is a cut."""
        law = self._engine.cut_law
        if self._engine.prefixes.budget > 0 and output[-1] in law.turn_ends:
            chat = [*prompt, *output]
            last_cut = max(law.cuts(chat), default=0)
            if last_cut > len(prompt):
                self._chats.append(chat[:last_cut])

    def read(self, interrupted: Callable[[], bool]) -> None:
        """The latest, chunk by chunk until `interrupted`; then it is left to the prompt that has arrived."""
        try:
            self._read(self._chats[-1], interrupted)
        except ServingError as error:
            log.warning("an answer could not be read for its next turn: %s", error)
        finally:
            self._chats.pop()

    def _read(self, chat: Sequence[int], interrupted: Callable[[], bool]) -> None:
        engine = self._engine
        known = engine.prefixes.find(chat, engine.cut_law.cuts(chat))
        if known is not None and known.end == len(chat):
            return
        place, self.places = engine.take_place(), 1
        try:
            reading = PromptReading(engine, place, chat)
            while not reading.done and not interrupted():
                reading.step()
        finally:
            engine.give_place(place)
            self.places = 0
