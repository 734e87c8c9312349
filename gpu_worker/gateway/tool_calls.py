"""Tool calls found in a reply while its text comes.

A call stands between `<tool_call>` and `</tool_call>`, in one of two forms, which the template defines:

    json   {"name": "f", "arguments": {"x": 1}}                                  (Hermes, Qwen 2.5 and 3)
    xml    <function=f> <parameter=x> 1 </parameter> </function>                 (Qwen 3 Coder, Nemotron 3)

A call is told when it is complete, because only then is it known to be one: what is malformed, or calls a
tool that was not offered, is given back as text, character by character. White space around calls belongs to
them.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpu_worker.gateway.arguments import strict_json, typed
from gpu_worker.gateway.reasoning import part_of

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_VALUE, _END_OF_VALUE = "<parameter=", "</parameter>"
_MARKS = re.compile("|".join((CLOSE, _VALUE, _END_OF_VALUE)))
_LONGEST = max(map(len, (CLOSE, _VALUE, _END_OF_VALUE)))
_FUNCTION = re.compile(r"\s*<function=([^<>]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^<>]+)>(.*?)</parameter>\s*", re.DOTALL)

Schemas = Mapping[str, Mapping[str, Any]]  # of the parameters of each tool, by its name


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str  # JSON
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


class ToolCallSplitter:
    """Splits one reply. Holds back a call that is not complete, and what may be the beginning of one."""

    def __init__(self, form: str, schemas: Schemas) -> None:
        """`form`: json or xml; only the tools of `schemas` can be called."""
        self._parse = {"json": _json_call, "xml": _xml_call}[form]
        self._has_values = form == "xml"
        self._schemas = schemas
        self._held = ""
        self._call_at: int | None = None  # where in it a call begins, after its opening mark
        self._scanned = 0  # up to where in it marks were looked for
        self._in_value = False
        self._called = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Text and calls that `text` settles."""
        self._held += text
        shown = ""
        calls: list[ToolCall] = []
        while self._call_at is not None or self._opened():
            end = self._end_of_call()
            if end is None:
                return shown, calls
            before, call = self._take(end)
            shown += before
            calls += call
        settled = self._settled()
        shown, self._held = shown + self._held[:settled], self._held[settled:]
        return shown, calls

    def flush(self, complete: bool) -> tuple[str, list[ToolCall]]:
        """What was held back, once it is known that nothing follows. If the reply is `complete`, its last
        call may lack the closing mark."""
        held, self._held = self._held, ""
        if complete and self._call_at is not None:
            start, self._call_at = self._call_at, None
            if (call := self._parse(held[start:], self._schemas)) is not None:
                return held[: start - len(OPEN)].rstrip(), [call]
        return ("" if self._called and held.isspace() else held), []

    def _opened(self) -> bool:
        start = self._held.find(OPEN)
        if start < 0:
            return False
        self._call_at = self._scanned = start + len(OPEN)
        return True

    def _end_of_call(self) -> int | None:
        """Where its closing mark ends; one within a parameter's value is text."""
        for mark in _MARKS.finditer(self._held, self._scanned):
            self._scanned = mark.end()
            if mark[0] == CLOSE and not (self._in_value and self._has_values):
                self._in_value = False
                return mark.end()
            self._in_value = mark[0] == _VALUE
        self._scanned = max(self._scanned, len(self._held) - _LONGEST + 1)
        return None

    def _take(self, end: int) -> tuple[str, list[ToolCall]]:
        """Text before the call and the call, or all of it as text."""
        assert self._call_at is not None
        start, self._call_at = self._call_at, None
        taken, self._held = self._held[:end], self._held[end:]
        call = self._parse(taken[start : -len(CLOSE)], self._schemas)
        if call is None:
            return taken, []
        self._called = True
        return taken[: start - len(OPEN)].rstrip(), [call]

    def _settled(self) -> int:
        """How much of what is held cannot belong to a call."""
        held = self._held
        return len(held[: len(held) - part_of(OPEN, held)].rstrip())


def _json_call(body: str, schemas: Schemas) -> ToolCall | None:
    try:
        call = strict_json(body)
        name, arguments = call["name"], call["arguments"]
        if isinstance(arguments, str):  # JSON within JSON
            arguments = strict_json(arguments)
        known = name in schemas and isinstance(arguments, dict)
    except (ValueError, TypeError, KeyError):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False)) if known else None


def _xml_call(body: str, schemas: Schemas) -> ToolCall | None:
    function = _FUNCTION.fullmatch(body)
    if function is None or function[1] not in schemas:
        return None
    name, parameters = function[1], schemas[function[1]]
    arguments: dict[str, Any] = {}
    for key, value in _parameters(function[2]):
        if key is None or key in arguments:
            return None
        arguments[key] = typed(value, key, parameters)
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _parameters(text: str) -> Iterator[tuple[str | None, str]]:
    """Names and values; a name of None: what is there is none of these."""
    at = 0
    while parameter := _PARAMETER.match(text, at):
        at = parameter.end()
        yield parameter[1], parameter[2].removeprefix("\n").removesuffix("\n")
    if text[at:].strip():
        yield None, ""
