"""Chats: what a request says reaches the template, and the template says how replies look.

The templates have the forms of published ones (tests/helpers/chat_templates.py); transformers renders them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from common.errors import InvalidRequest
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.chat_template import ChatTemplate
from gpu_worker.chats import chat_tokens, reply_forms
from gpu_worker.client import chat
from gpu_worker.tokenizer import Tokenizer
from tests.helpers.chat_templates import TEMPLATES

Make = Callable[[Any], Tokenizer]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
MOST = 1 << 20
USER = {"role": "user", "content": "Hi"}
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(chat_template: Any) -> Tokenizer:
        """Of bytes; the marks of chats are tokens of their own, declared special as published ones are."""
        backend = Backend(
            models.BPE({c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
        )
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(m) for m in ("<|im_start|>", "<|im_end|>", *MARKS)])
        backend.save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat_template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer.from_directory(tmp_path)
        assert tokenizer is not None
        return tokenizer

    return make


def text_of(tokenizer: Tokenizer, request: pb.Chat) -> str:
    return tokenizer.decode(chat_tokens(request, tokenizer, MOST))


def test_tools_fields_and_arguments_reach_the_template(make: Make) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [USER, {"role": "assistant", "content": "", "reasoning_content": "So.", "tool_calls": [call]}]
    tokenizer = make(TEMPLATES["xml"])
    text = text_of(tokenizer, chat(messages, [TOOL]))
    assert json.dumps(TOOL) in text
    assert "<think>\nSo.\n</think>" in text
    assert "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>" in text
    assert text.endswith("assistant\n<think>\n")
    assert text_of(tokenizer, chat([USER], enable_thinking=False)).endswith("assistant\n<think></think>")


def test_whether_a_prompt_opens_reasoning(make: Make) -> None:
    tokenizer = make(TEMPLATES["json"])
    for thinking in (True, False):
        tokens = chat_tokens(chat([USER], enable_thinking=thinking), tokenizer, MOST)
        assert tokenizer.opens_reasoning(tokens) is thinking
    assert not tokenizer.opens_reasoning([])
    assert not tokenizer.opens_reasoning(tokenizer.encode("<think> long before the end of it"))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (chat([USER], colour="red"), "has no argument 'colour'; it has: enable_thinking"),
        (chat([USER], chat_template="{{ 1 }}"), "no argument 'chat_template'"),
        (chat([USER], tools=[]), "no argument 'tools'"),
        (chat([USER], messages=[]), "no argument 'messages'"),
        (chat([USER], add_generation_prompt=False), "no argument 'add_generation_prompt'"),
        (pb.Chat(messages=[pb.ChatMessage(role="user", fields_json="{")]), "fields_json is not JSON"),
        (
            pb.Chat(messages=[pb.ChatMessage(role="user", fields_json="[]")]),
            "fields_json must be a JSON object",
        ),
        (pb.Chat(messages=[pb.ChatMessage(role="user")], tools_json="{}"), "tools_json must be a JSON array"),
        (pb.Chat(messages=[pb.ChatMessage(role="user")], tools_json="[" * 10**5), "tools_json is not JSON"),
        (pb.Chat(), "no messages"),
    ],
)
def test_what_is_rejected(make: Make, request_: pb.Chat, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        chat_tokens(request_, make(TEMPLATES["json"]), MOST)


def test_fields_do_not_replace_role_and_content(make: Make) -> None:
    message = pb.ChatMessage(role="user", content="Hi", fields_json='{"role": "system", "content": "Ha"}')
    assert "user\nHi" in text_of(make(TEMPLATES["json"]), pb.Chat(messages=[message]))


def test_tools_for_a_template_without(make: Make) -> None:
    tokenizer = make("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert text_of(tokenizer, chat([USER])) == "Hi"
    with pytest.raises(InvalidRequest, match="takes no tools"):
        chat_tokens(chat([USER], [TOOL]), tokenizer, MOST)


def test_several_templates(make: Make) -> None:
    plain = "plain {{ messages[0].content }}"
    several = [{"name": "default", "template": plain}, {"name": "tool_use", "template": TEMPLATES["json"]}]
    tokenizer = make(several)
    assert text_of(tokenizer, chat([USER])) == "plain Hi"
    assert json.dumps(TOOL) in text_of(tokenizer, chat([USER], [TOOL]))
    assert reply_forms(tokenizer) == {"tool_call_form": "json", "reasoning_form": "think"}


def test_forms_of_replies(make: Make) -> None:
    assert reply_forms(make(TEMPLATES["xml"])) == {"tool_call_form": "xml", "reasoning_form": "think"}
    assert reply_forms(make("{{ messages[0].content }}")) == {"tool_call_form": "", "reasoning_form": ""}
    assert reply_forms(None) == {}


def test_marks_are_text_only_where_the_template_has_them(make: Make) -> None:
    """Declared special, they would be left out of the text, and with them what tells its parts apart."""
    reply = "<think>a</think>b<tool_call>{}</tool_call><|im_end|>"
    tokenizer = make(TEMPLATES["json"])
    ids = tokenizer.encode(reply)
    assert tokenizer.decode(ids) == reply.removesuffix("<|im_end|>")
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)
    assert make("{{ messages[0].content }}").decode(ids) == "ab{}"


def test_arguments_that_a_template_sets_itself() -> None:
    template = (
        "{% set thinking = thinking if thinking is defined else true %}"
        "{% generation %}{{ bos_token }}{{ strftime_now('%d') }}{% endgeneration %}"
        "{% for x in messages %}{% break %}{% endfor %}{% macro m(a) %}{{ a }}{{ budget }}{% endmacro %}"
    )
    assert ChatTemplate([template]).arguments == {"thinking", "budget"}


def test_a_broken_template() -> None:
    with pytest.raises(InvalidRequest, match="template is broken"):
        ChatTemplate(["{% if %}"]).check([], {"x": 1})
