"""Answers to completion requests: `n` to each prompt, those of the first prompt first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.gateway import replies
from gpu_worker.gateway.answers import by_index, finish_reason, head, null_usage
from gpu_worker.gateway.logprobs import TextOffsets, completion_logprobs
from gpu_worker.gateway.requests import CompletionRequest


class Completions:
    """See `Answers`."""

    def __init__(self, request: CompletionRequest, prompts: int, model: str, usage_follows: bool) -> None:
        self._head = head("cmpl", model)
        self._samples = request.n or 1
        self._alternatives = request.logprobs  # None: no log-probabilities at all
        self._offsets = [TextOffsets() for _ in range(self._samples * prompts)]
        self._usage = null_usage(usage_follows)

    def opening(self) -> list[replies.Reply]:
        return []

    def add(self, prompt: int, event: pb.GenerateEvent) -> replies.Completion | None:
        index, finish = prompt * self._samples + event.index, finish_reason(event)
        logprobs = None
        if self._alternatives is not None and event.delta.tokens:
            logprobs = completion_logprobs(event.delta.tokens, self._alternatives, self._offsets[index])
        if not (event.delta.text or logprobs or finish):
            return None
        choice = replies.CompletionChoice(
            index=index, text=event.delta.text, logprobs=logprobs, finish_reason=finish
        )
        return self._reply([choice], **self._usage)

    def last(self, usage: replies.Usage) -> replies.Completion:
        return self._reply([], usage=usage)

    def whole(self, pieces: Sequence[replies.Completion], usage: replies.Usage) -> replies.Completion:
        parts = by_index((choice for piece in pieces for choice in piece.choices), len(self._offsets))
        return self._reply([self._joined(n, own) for n, own in enumerate(parts)], usage=usage)

    def _joined(self, index: int, parts: Sequence[replies.CompletionChoice]) -> replies.CompletionChoice:
        logprobs = [part.logprobs for part in parts if part.logprobs is not None]
        return replies.CompletionChoice(
            index=index,
            text="".join(part.text for part in parts),
            logprobs=_all(logprobs) if self._alternatives is not None else None,
            finish_reason=parts[-1].finish_reason,
        )

    def _reply(self, choices: list[replies.CompletionChoice], **fields: Any) -> replies.Completion:
        return replies.Completion(object="text_completion", choices=choices, **self._head, **fields)


def _all(parts: Sequence[replies.CompletionLogprobs]) -> replies.CompletionLogprobs:
    top = [entry for part in parts for entry in part.top_logprobs or ()]
    return replies.CompletionLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[logprob for part in parts for logprob in part.token_logprobs],
        top_logprobs=top or None,
        text_offset=[offset for part in parts for offset in part.text_offset],
    )
