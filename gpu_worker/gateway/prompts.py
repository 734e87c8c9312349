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
        """Raises PermissionDenied for what this key may never ask for. Tokens of texts are not known here;
        those limits are the worker's."""
        known = max(0 if isinstance(prompt, str | pb.Chat) else len(prompt) for prompt in self.prompts)
        output = len(self.prompts) * self.samples * self.sampling["max_new_tokens"]
        usage.check_possible(len(self.prompts))
        usage.check_allowance(known, output, self.priority)


def of_completion(
    request: CompletionRequest, info: pb.ModelInfoReply, usage: KeyUsage | None = None
) -> Asked:
    """`usage` of the caller's key, which lowers defaults to what it allows."""
    if not info.has_tokenizer:
        raise RequestError(400, "this checkpoint has no tokenizer: answers have no text, only gRPC tells ids")
    prompt = request.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts: Any = prompt if several else [prompt]
    logprobs = None if request.logprobs is None else max(1, request.logprobs)
    most = _MostTokens(request.max_tokens, _COMPLETION_TOKENS)
    return _asked(request, prompts, most, logprobs, usage)


def of_chat(request: ChatRequest, info: pb.ModelInfoReply, usage: KeyUsage | None = None) -> Asked:
    """`usage` as for completions."""
    messages = [_message(message, f"messages[{n}]") for n, message in enumerate(request.messages)]
    tools = [tool.model_dump(exclude_unset=True) for tool in offered_tools(request)]
    try:
        prompt = chat(messages, tools, **(request.chat_template_kwargs or {}))
    except (ValueError, RecursionError) as error:
        raise not_passed_on(error) from None
    most = _MostTokens(request.max_completion_tokens or request.max_tokens, info.max_context)
    logprobs = max(1, request.top_logprobs or 0) if request.logprobs else None
    return _asked(request, [prompt], most, logprobs, usage)


def offered_tools(request: ChatRequest) -> list[Any]:
    """What the model is told of, and may call."""
    return [] if request.tool_choice == "none" else list(request.tools or [])


@dataclass(frozen=True)
class _MostTokens:
    """Of one answer: what the client said, or else the default."""

    given: int | None
    default: int

    def sampling(self, answers: int, usage: KeyUsage | None) -> dict[str, Any]:
        """The worker may know of limits of the key that are not known here, and lowers defaults to them."""
        if self.given is not None:
            return {"max_new_tokens": self.given}
        allowed = self.default if usage is None else usage.allowed_output(self.default, answers)
        return {"max_new_tokens": allowed, "lower_to_allowed": True}


def _asked(
    request: Sampling,
    prompts: list[Prompt],
    most: _MostTokens,
    logprobs: int | None,
    usage: KeyUsage | None,
) -> Asked:
    samples = request.n or 1
    sampling = most.sampling(len(prompts) * samples, usage) | {
        "temperature": 1.0 if request.temperature is None else request.temperature,  # OpenAI's default
        "top_k": max(0, request.top_k or 0),
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "seed": None if request.seed is None else request.seed % (1 << 64),  # negative ones are seeds, too
        "stop": [request.stop] if isinstance(request.stop, str) else request.stop,
        "ignore_eos": request.ignore_eos,
        "logprobs": logprobs,
    }
    given = {name: value for name, value in sampling.items() if value is not None}
    return Asked(prompts, samples, request.priority or 0, given)


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
