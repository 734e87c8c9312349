"""Reasoning set apart: by example, and the same however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.gateway.reasoning import ReasoningSplitter
from tests.helpers.gateways import cut


def split(pieces: list[str], opened: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened)
    parts = [*(splitter.push(piece) for piece in pieces), splitter.flush()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer"),
    [
        ("<think>\nHm. So.\n</think>\n\nYes.", False, "Hm. So.", "Yes."),
        ("Hm. So.\n</think>\n\nYes.", True, "Hm. So.", "Yes."),
        ("\n <think>a</think>b", False, "a", "b"),
        ("<think></think>b", False, "", "b"),
        ("</think>b", True, "", "b"),
        ("no marks", False, "", "no marks"),
        ("cut off <b", True, "cut off <b", ""),
        ("cut off </thin", True, "cut off </thin", ""),
        ("ends in space \n\n", True, "ends in space", ""),
        ("<think>a</think>b<think>c</think>d", False, "a", "b<think>c</think>d"),
        ("x<think>a</think>", False, "", "x<think>a</think>"),
        ("a </thin k> <think> b</think>c", True, "a </thin k> <think> b", "c"),
        ("<thinking>", False, "", "<thinking>"),
        ("<thi", False, "", "<thi"),
        (" \n", False, "", " \n"),
        ("", True, "", ""),
    ],
)
def test_examples(text: str, opened: bool, reasoning: str, answer: str) -> None:
    assert split([text], opened) == (reasoning, answer)
    assert split(list(text), opened) == (reasoning, answer)


@settings(deadline=None)
@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "é"])).map(
        "".join
    ),
    opened=st.booleans(),
    data=st.data(),
)
def test_cutting_changes_nothing(text: str, opened: bool, data: st.DataObject) -> None:
    assert split(cut(text, data), opened) == split([text], opened)


def test_what_is_settled_is_shown_at_once() -> None:
    splitter = ReasoningSplitter(opened=True)
    assert splitter.push("a b ") == ("a b", "")
    assert splitter.push("c") == (" c", "")
    assert splitter.push("<") == ("", "")
    assert splitter.push("/p>") == ("</p>", "")
    assert splitter.push("</think>\nd") == ("", "d")
    assert splitter.push(" ") == ("", " ")
