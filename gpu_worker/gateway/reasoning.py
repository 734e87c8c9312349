"""Reasoning set apart from the answer while the text comes: what `<think>` and `</think>` enclose.

Only the beginning of a reply can be reasoning; a mark that comes later is text. White space around both parts
belongs to the marks. Which templates reply so is known to `gpu_worker.chat_template`.
"""

from __future__ import annotations

from enum import Enum, auto

OPEN, CLOSE = "<think>", "</think>"


class _State(Enum):
    """Either START --text--> ANSWER, or
    START --OPEN--> OPENED --text--> REASONING --CLOSE--> CLOSED --text--> ANSWER."""

    START = auto()
    OPENED = auto()
    REASONING = auto()
    CLOSED = auto()
    ANSWER = auto()


class ReasoningSplitter:
    """Splits one reply. Holds back what may be part of a mark, or white space before one."""

    def __init__(self, opened: bool) -> None:
        """`opened`: the prompt ends with the opening mark."""
        self._state = _State.OPENED if opened else _State.START
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """Reasoning and answer that `text` settles."""
        text, self._held, reasoning = self._held + text, "", ""
        if self._state is _State.START:
            text = self._begin(text)
        if self._state is _State.OPENED and (text := text.lstrip()):
            self._state = _State.REASONING
        if self._state is _State.REASONING:
            reasoning, text = self._reason(text)
        if self._state is _State.CLOSED and (text := text.lstrip()):
            self._state = _State.ANSWER
        return reasoning, text

    def flush(self) -> tuple[str, str]:
        """What was held back, once it is known that nothing follows."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._state is _State.REASONING else ("", held)

    def _begin(self, text: str) -> str:
        stripped = text.lstrip()
        if stripped.startswith(OPEN):
            self._state = _State.OPENED
            return stripped[len(OPEN) :]
        if OPEN.startswith(stripped):
            self._held = text
            return ""
        self._state = _State.ANSWER
        return text

    def _reason(self, text: str) -> tuple[str, str]:
        """The reasoning in `text`, and what is after it."""
        end = text.find(CLOSE)
        if end >= 0:
            self._state = _State.CLOSED
            return text[:end].rstrip(), text[end + len(CLOSE) :]
        settled = len(text[: len(text) - part_of(CLOSE, text)].rstrip())
        self._held = text[settled:]
        return text[:settled], ""


def part_of(mark: str, text: str) -> int:
    """Length of the longest end of `text` with which `mark` begins, but for the whole of it."""
    lengths = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(mark[:length])), 0)
