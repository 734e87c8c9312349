"""Chats on the wire: what a request says made the template's input, and what is told of replies to it."""

from __future__ import annotations

import json
from typing import Any

from common.errors import InvalidRequest
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.tokenizer import Tokenizer


def chat_tokens(chat: pb.Chat, tokenizer: Tokenizer, most: int) -> list[int]:
    """Token ids of a chat; InvalidRequest for what is no JSON, what the template does not take, and far more
    than `most` tokens."""
    messages = [
        {
            **_parsed("fields_json", message.fields_json, dict),
            "role": message.role,
            "content": message.content,
        }
        for message in chat.messages
    ]
    tools = _parsed("tools_json", chat.tools_json, list)
    arguments = _parsed("template_arguments_json", chat.template_arguments_json, dict)
    return tokenizer.encode_chat(messages, tools, arguments, most)


def reply_forms(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Fields of ModelInfoReply."""
    template = tokenizer.chat_template if tokenizer else None
    if template is None:
        return {}
    return {"tool_call_form": template.tool_call_form, "reasoning_form": template.reasoning_form}


def _parsed(name: str, text: str, kind: type[Any]) -> Any:
    """The value of a field that holds JSON; nothing is an empty one."""
    if not text:
        return kind()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise InvalidRequest(f"{name} must be a JSON {'object' if kind is dict else 'array'}")
    return value
