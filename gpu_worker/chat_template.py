"""What a checkpoint's chat template says of itself: which arguments it reads, and which forms replies have.

A template is text in Jinja. It is parsed here, and rendered elsewhere (`tokenizer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from common.errors import InvalidRequest

THINK = "<think>"
TOOL_CALL = "<tool_call>"
# What separates the parts of a reply. A tokenizer may declare these special, but they belong to the text.
MARKS = (THINK, "</think>", TOOL_CALL, "</tool_call>")
# What the caller of a template gives it by other means, or never.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
_FUNCTIONS = {"raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner"}
_OF_THE_CALL = {"chat_template", "tokenize", "return_dict", "padding", "truncation", "max_length"}


class ChatTemplate:
    """A template's text, or several texts of which one is for chats with tools."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)

    @property
    def tool_call_form(self) -> str:
        """How a reply calls a tool: xml (`<function=...><parameter=...>` within the marks), json (an object
        with name and arguments within them), or nothing that is known here."""
        if not self._mentions(TOOL_CALL):
            return ""
        return "xml" if self._mentions("<function=") else "json"

    @property
    def reasoning_form(self) -> str:
        """How a reply sets its reasoning apart: think (`<think>` and `</think>` around it), or not."""
        return "think" if self._mentions("</think>") else ""

    @property
    def marks(self) -> tuple[str, ...]:
        """Those of MARKS that replies have by this template."""
        return tuple(mark for mark in MARKS if self._mentions(mark))

    @property
    def arguments(self) -> frozenset[str]:
        """Variables that a caller may set, such as enable_thinking."""
        names = self._variables - _GIVEN - _FUNCTIONS - _OF_THE_CALL
        return frozenset(name for name in names if not name.endswith("_token"))

    def check(self, tools: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        """Raises InvalidRequest for what the template would silently ignore."""
        if tools and "tools" not in self._variables:
            raise InvalidRequest("this checkpoint's chat template takes no tools")
        if unknown := sorted(set(arguments) - self.arguments):
            known = ", ".join(sorted(self.arguments)) or "none"
            raise InvalidRequest(f"the chat template has no argument {unknown[0]!r}; it has: {known}")

    @cached_property
    def _variables(self) -> frozenset[str]:
        environment = Environment(extensions=["jinja2.ext.loopcontrols", _Generation])  # noqa: S701 -- only parses
        try:
            parsed = [environment.parse(text) for text in self._texts]
        except TemplateSyntaxError as error:
            raise InvalidRequest(f"this checkpoint's chat template is broken: {error}") from None
        return frozenset().union(*(meta.find_undeclared_variables(tree) for tree in parsed))

    def _mentions(self, text: str) -> bool:
        return any(text in template for template in self._texts)


class _Generation(Extension):
    """transformers' `{% generation %}`, which marks what the assistant said and changes nothing."""

    tags = {"generation"}  # noqa: RUF012 -- as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
