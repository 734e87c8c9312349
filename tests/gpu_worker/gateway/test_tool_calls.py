"""Tool calls found in text: what templates render is parsed back, and all else stays text.

The forms are those that transformers renders by templates; cutting the text must change nothing.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from gpu_worker.gateway.tool_calls import ToolCallSplitter
from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.gateways import cut

SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "wind": {"type": "boolean"},
            "limits": {"type": "object"},
            "hours": {"type": "array"},
        },
    },
    "stop": {},
}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)
LEAF = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | TEXT
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": TEXT,
        "days": st.integers(-(2**60), 2**60),
        "wind": st.booleans(),
        "limits": st.dictionaries(TEXT, LEAF, max_size=3),
        "hours": st.lists(LEAF, max_size=3),
    },
)
CALLS = st.lists(st.tuples(st.just("weather"), ARGUMENTS) | st.just(("stop", {})), min_size=1, max_size=3)


def split(form: str, pieces: list[str], complete: bool = True) -> tuple[str, list[tuple[str, Any]]]:
    splitter = ToolCallSplitter(form, SCHEMAS)
    parts = [*(splitter.push(piece) for piece in pieces), splitter.flush(complete)]
    calls = [call for part in parts for call in part[1]]
    assert len({call.id for call in calls}) == len(calls)
    text = "".join(part[0] for part in parts)
    return text, [(call.name, json.loads(call.arguments)) for call in calls]


def rendered(form: str, content: str, calls: list[tuple[str, Any]]) -> str:
    """As the template has an assistant's message."""
    functions = [{"type": "function", "function": {"name": name, "arguments": a}} for name, a in calls]
    message = {"role": "assistant", "content": content, "tool_calls": functions}
    (text,), _ = render_jinja_template([[message]], chat_template=TEMPLATES[form])
    return text.removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")


@pytest.mark.parametrize("form", ["json", "xml"])
@settings(deadline=None)
@given(calls=CALLS, content=TEXT.map(str.strip), data=st.data())
def test_what_a_template_renders_is_parsed_back(
    form: str, calls: list[tuple[str, Any]], content: str, data: st.DataObject
) -> None:
    text = rendered(form, content, calls)
    assert split(form, cut(text, data)) == (content, calls)


PARTS = ["<tool_call>", "</tool_call>", "<function=stop>", "</function>", "<parameter=x>", "</parameter>"]
PARTS += ["<", "tool_call>", '{"name": "stop", "arguments": {}}', "\n", " ", "a"]


@pytest.mark.parametrize("form", ["json", "xml"])
@settings(deadline=None)
@given(
    text=st.lists(st.sampled_from(PARTS), max_size=12).map("".join), complete=st.booleans(), data=st.data()
)
def test_cutting_changes_nothing(form: str, text: str, complete: bool, data: st.DataObject) -> None:
    assert split(form, cut(text, data), complete) == split(form, [text], complete)


@pytest.mark.parametrize("form", ["json", "xml"])
@settings(deadline=None)
@given(text=st.lists(st.sampled_from([p for p in PARTS if "stop" not in p]), max_size=12).map("".join))
def test_without_a_call_the_text_is_as_it_was(form: str, text: str) -> None:
    assert split(form, [text]) == (text, [])


JSON_STOP = '{"name": "stop", "arguments": {}}'
XML_STOP = "<function=stop>\n</function>"


@pytest.mark.parametrize(
    ("form", "body"),
    [
        ("json", "no JSON"),
        ("json", '{"name": "stop"}'),
        ("json", '{"name": "stop", "arguments": [1]}'),
        ("json", '{"name": "stop", "arguments": "no JSON"}'),
        ("json", '{"name": "unknown", "arguments": {}}'),
        ("json", '{"name": ["stop"], "arguments": {}}'),
        ("json", '{"name": "stop", "arguments": {"x": NaN}}'),
        ("json", '{"name": "stop", "arguments": {"x": 1e999}}'),
        ("json", '{"name": "stop", "arguments": {"x": "\\ud800"}}'),
        ("json", f"[{JSON_STOP}]"),
        ("json", JSON_STOP * 2),
        ("json", XML_STOP),
        ("json", "[" * 100_000),
        ("xml", JSON_STOP),
        ("xml", "<function=unknown>\n</function>"),
        ("xml", "<function=stop>"),
        ("xml", "<function=stop>text</function>"),
        ("xml", "<function=stop><parameter=x>1</parameter><parameter=x>2</parameter></function>"),
        ("xml", "<function=stop><parameter=x>1</function>"),
        ("xml", XML_STOP + XML_STOP),
    ],
)
def test_a_malformed_call_is_text(form: str, body: str) -> None:
    good = JSON_STOP if form == "json" else XML_STOP
    bad = f"Look: \n\n<tool_call>\n{body}\n</tool_call>"
    assert split(form, [bad]) == (bad, [])
    if "<parameter=x>1</function>" not in body:  # a value that does not end takes in all that follows
        text = f"{bad} and\n<tool_call>{good}</tool_call>\n"
        assert split(form, list(text) if len(text) < 1000 else [text]) == (f"{bad} and", [("stop", {})])


@pytest.mark.parametrize(("form", "call"), [("json", JSON_STOP), ("xml", XML_STOP)])
def test_the_last_mark_may_lack_unless_the_reply_was_cut_off(form: str, call: str) -> None:
    text = f"So\n<tool_call>\n{call}"
    assert split(form, [text]) == ("So", [("stop", {})])
    assert split(form, [text], complete=False) == (text, [])


def test_marks_within_a_value_are_text() -> None:
    value = "if x: '<tool_call>' and '</tool_call>'"
    text = f"<tool_call><function=weather><parameter=city>{value}</parameter></function></tool_call>"
    assert split("xml", list(text)) == ("", [("weather", {"city": value})])


def test_a_call_is_told_as_soon_as_it_is_complete() -> None:
    splitter = ToolCallSplitter("json", SCHEMAS)
    assert splitter.push("Well, \n\n<tool") == ("Well,", [])
    assert splitter.push(f"_call>{JSON_STOP}</tool_call") == ("", [])
    text, (call,) = splitter.push(">")
    assert (text, call.name) == ("", "stop")
    assert splitter.push("\n") == ("", [])
    assert splitter.flush(complete=True) == ("", [])


@pytest.mark.timeout(20)
def test_a_long_reply_of_marks_takes_no_longer_than_another() -> None:
    """Looking for the end from the start again, at each piece, would take minutes."""
    pieces = ["<tool_call>", "<function=stop>", "<parameter=x>"] * 5_000
    assert split("xml", pieces) == ("".join(pieces), [])
    assert split("json", ["</tool_call><tool_call>"] * 5_000)[1] == []
