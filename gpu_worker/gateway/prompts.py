"""What is asked of the worker: requests of HTTP clients in the worker's terms."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from common.key_usage import KeyUsage
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.client import Prompt, chat
from gpu_worker.gateway.errors import RequestError, not_passed_on
from gpu_worker.gateway.requests import (
    AssistantMessage,
    CalledFunction,
    ChatRequest,
    CompletionRequest,
    Content,
    Message,
    Sampling,
    ToolMessage,
)

_COMPLETION_TOKENS = 16  # OpenAI's default; that of chats is all that there is room for


@dataclass(frozen=True)
class Asked:
    """One call of the worker for each prompt, each for so many answers."""

    prompts: list[Prompt]
    samples: int
    priority: int
    sampling: dict[str, Any]  # fields of SamplingParams

    def check_allowance(self, usage: KeyUsage) -> None:
        """Raises PermissionDenied. Tokens of texts are not known here; those limits are the worker's."""
        known = max(0 if isinstance(prompt, str | pb.Chat) else len(prompt) for prompt in self.prompts)
        output = len(self.prompts) * self.samples * self.sampling["max_new_tokens"]
        usage.check_allowance(known, output, self.priority)


def of_completion(request: CompletionRequest, info: pb.ModelInfoReply) -> Asked:
    if not info.has_tokenizer:
        raise RequestError(400, "this checkpoint has no tokenizer: answers have no text, only gRPC tells ids")
    prompt = request.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts: Any = prompt if several else [prompt]
    logprobs = None if request.logprobs is None else max(1, request.logprobs)
    return _asked(request, prompts, request.max_tokens or _COMPLETION_TOKENS, logprobs)


def of_chat(request: ChatRequest, info: pb.ModelInfoReply, usage: KeyUsage | None = None) -> Asked:
    """`usage` of the caller's key, whose limit is then the default."""
    messages = [_message(message, f"messages[{n}]") for n, message in enumerate(request.messages)]
    tools = [tool.model_dump(exclude_unset=True) for tool in offered_tools(request)]
    try:
        prompt = chat(messages, tools, **(request.chat_template_kwargs or {}))
    except (ValueError, RecursionError) as error:
        raise not_passed_on(error) from None
    most = request.max_completion_tokens or request.max_tokens
    if most is None:
        most = info.max_context
        if usage is not None and usage.rules.max_output_tokens is not None:
            most = max(1, min(most, usage.rules.max_output_tokens // (request.n or 1)))
    logprobs = max(1, request.top_logprobs or 0) if request.logprobs else None
    return _asked(request, [prompt], most, logprobs)


def offered_tools(request: ChatRequest) -> list[Any]:
    """What the model is told of, and may call."""
    return [] if request.tool_choice == "none" else list(request.tools or [])


def _asked(request: Sampling, prompts: list[Prompt], most: int, logprobs: int | None) -> Asked:
    sampling = {
        "temperature": 1.0 if request.temperature is None else request.temperature,  # OpenAI's default
        "top_k": max(0, request.top_k or 0),
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "seed": None if request.seed is None else request.seed % (1 << 64),  # negative ones are seeds, too
        "max_new_tokens": most,
        "stop": [request.stop] if isinstance(request.stop, str) else request.stop,
        "ignore_eos": request.ignore_eos,
        "logprobs": logprobs,
    }
    given = {name: value for name, value in sampling.items() if value is not None}
    return Asked(prompts, request.n or 1, request.priority or 0, given)


def _message(message: Message, where: str) -> dict[str, Any]:
    """As templates read it: content as one text, arguments of calls as objects, and no role but theirs."""
    fields: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(message.content),
    }
    if message.name is not None:
        fields["name"] = message.name
    if isinstance(message, ToolMessage):
        fields["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if message.reasoning_content:
            fields["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            fields["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": _function(call.function, f"{where}.tool_calls[{n}].function"),
                }
                for n, call in enumerate(message.tool_calls)
            ]
    return fields


def _function(function: CalledFunction, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        param = f"{where}.arguments"
        raise RequestError(400, f"{param} must be a JSON object", param=param, code="invalid_value")
    return {"name": function.name, "arguments": arguments}


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)
