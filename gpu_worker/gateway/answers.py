"""What completions and chats have in common: how their answers are put together from the worker's events.

`add` makes of an event the piece that a stream shows; `whole` makes of all pieces what is sent without
streaming, so that both say the same.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from common.errors import ServingError
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.gateway import replies

_REASONS: Mapping[str, replies.FinishReason] = {"stop": "stop", "eos": "stop", "length": "length"}
Choice = TypeVar("Choice", replies.CompletionChoice, replies.ChatChunkChoice)


class Answers(Protocol):
    """Those to one request, told apart by their index."""

    def opening(self) -> list[replies.Reply]:
        """Pieces of a stream that come before all others."""

    def add(self, prompt: int, event: pb.GenerateEvent) -> replies.Reply | None:
        """The piece that an event of prompt number `prompt` makes, if it makes one."""

    def last(self, usage: replies.Usage) -> replies.Reply:
        """The piece of a stream that tells usage and nothing else."""

    def whole(self, pieces: Sequence[Any], usage: replies.Usage) -> replies.Reply:
        """Of all that `add` made."""


class UsageCount:
    """Tokens of all prompts and answers; a prompt is counted once, however many answers it has."""

    def __init__(self) -> None:
        self._prompts: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._completion = 0

    def add(self, prompt: int, usage: pb.Usage) -> None:
        self._prompts[prompt] = usage.prompt_tokens
        # Of several answers, later ones may find what the first has read.
        cached = self._cached.get(prompt, usage.cached_prompt_tokens)
        self._cached[prompt] = min(cached, usage.cached_prompt_tokens)
        self._completion += usage.completion_tokens

    def total(self) -> replies.Usage:
        prompt, cached = sum(self._prompts.values()), sum(self._cached.values())
        return replies.Usage(
            prompt_tokens=prompt,
            completion_tokens=self._completion,
            total_tokens=prompt + self._completion,
            prompt_tokens_details=replies.PromptTokensDetails(cached_tokens=cached),
        )


def head(prefix: str, model: str) -> dict[str, Any]:
    """Fields of all pieces of a reply."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def null_usage(usage_follows: bool) -> dict[str, Any]:
    """Fields of the pieces of a stream that tells usage in its last."""
    return {"usage": None} if usage_follows else {}


def by_index(choices: Iterable[Choice], count: int) -> list[list[Choice]]:
    """The parts of each of `count` answers."""
    parts: list[list[Choice]] = [[] for _ in range(count)]
    for choice in choices:
        parts[choice.index].append(choice)
    return parts


def finish_reason(event: pb.GenerateEvent) -> replies.FinishReason | None:
    """None while the answer goes on."""
    if not event.HasField("finish"):
        return None
    if event.finish.reason not in _REASONS:
        raise ServingError(f"the worker ended an answer for a reason not known here: {event.finish.reason!r}")
    return _REASONS[event.finish.reason]
