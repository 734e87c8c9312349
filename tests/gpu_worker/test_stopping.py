"""Stop strings: any text, cut in any way, ends where reading it one character at a time would end it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.stopping import StopMatcher

LETTERS = st.text(alphabet="ab€", max_size=30)  # few letters, so that stop strings overlap themselves
STOPS = st.lists(st.text(alphabet="ab€", min_size=1, max_size=5), max_size=4)


def run(stop: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher, shown = StopMatcher(stop), ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + matcher.flush(), False


def one_character_at_a_time(stop: list[str], text: str) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        matched = [len(s) for s in stop if text[:end].endswith(s)]
        if matched:
            return text[: end - max(matched)], True
    return text, False


@given(stop=STOPS, pieces=st.lists(LETTERS, max_size=8))
def test_any_cut_ends_like_single_characters(stop: list[str], pieces: list[str]) -> None:
    assert run(stop, pieces) == one_character_at_a_time(stop, "".join(pieces))


@given(stop=STOPS, text=LETTERS)
def test_no_more_than_a_possible_beginning_is_held_back(stop: list[str], text: str) -> None:
    matcher = StopMatcher(stop)
    shown, stopped = matcher.push(text)
    if not stopped:
        held = text[len(shown) :]
        assert not held or any(s.startswith(held) for s in stop)


@pytest.mark.parametrize(
    ("stop", "pieces", "shown", "stopped"),
    [
        ([], ["abc"], "abc", False),
        (["\n\n"], ["def f():\n", "\nx"], "def f():", True),
        (["END"], ["the E", "N", "D of"], "the ", True),
        (["END"], ["the E", "N", "E"], "the ENE", False),
        (["abc", "b"], ["xabc"], "xa", True),
        (["bc", "abc"], ["xabc"], "x", True),
        (["aab"], ["aaa", "b"], "a", True),
    ],
)
def test_examples(stop: list[str], pieces: list[str], shown: str, stopped: bool) -> None:
    assert run(stop, pieces) == (shown, stopped)
