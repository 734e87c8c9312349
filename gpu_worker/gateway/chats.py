"""Answers to chats: reasoning, content and tool calls told apart, `n` answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.gateway import replies
from gpu_worker.gateway.answers import by_index, finish_reason, head, null_usage
from gpu_worker.gateway.logprobs import chat_logprobs
from gpu_worker.gateway.prompts import offered_tools
from gpu_worker.gateway.reasoning import ReasoningSplitter
from gpu_worker.gateway.requests import ChatRequest
from gpu_worker.gateway.tool_calls import Schemas, ToolCall, ToolCallSplitter


class Chats:
    """See `Answers`."""

    def __init__(
        self, request: ChatRequest, info: pb.ModelInfoReply, model: str, usage_follows: bool
    ) -> None:
        self._head = head("chatcmpl", model)
        tools = [tool.function for tool in offered_tools(request)]
        schemas = {function.name: function.parameters or {} for function in tools}
        self._messages = [_Message(info, schemas) for _ in range(request.n or 1)]
        self._alternatives = (request.top_logprobs or 0) if request.logprobs else None
        self._usage = null_usage(usage_follows)

    def opening(self) -> list[replies.Reply]:
        delta = replies.ChatDelta(role="assistant", content="")
        return [self._chunk(index, delta, None, None) for index in range(len(self._messages))]

    def add(self, prompt: int, event: pb.GenerateEvent) -> replies.ChatCompletionChunk | None:
        message, finish = self._messages[event.index], finish_reason(event)
        fields = message.add(event)
        if finish == "stop" and message.calls:
            finish = "tool_calls"
        logprobs = None
        if self._alternatives is not None and event.delta.tokens:
            logprobs = chat_logprobs(event.delta.tokens, self._alternatives)
        if not (fields or logprobs or finish):
            return None
        return self._chunk(event.index, replies.ChatDelta(**fields), logprobs, finish)

    def last(self, usage: replies.Usage) -> replies.ChatCompletionChunk:
        return replies.ChatCompletionChunk(
            object="chat.completion.chunk", choices=[], usage=usage, **self._head
        )

    def whole(
        self, pieces: Sequence[replies.ChatCompletionChunk], usage: replies.Usage
    ) -> replies.ChatCompletion:
        parts = by_index((choice for piece in pieces for choice in piece.choices), len(self._messages))
        choices = [self._joined(n, own) for n, own in enumerate(parts)]
        return replies.ChatCompletion(object="chat.completion", choices=choices, usage=usage, **self._head)

    def _joined(self, index: int, parts: Sequence[replies.ChatChunkChoice]) -> replies.ChatChoice:
        calls = [call for part in parts for call in part.delta.tool_calls]
        content = "".join(part.delta.content for part in parts)
        reasoning = "".join(part.delta.reasoning_content for part in parts)
        logprobs = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        finish = parts[-1].finish_reason
        assert finish is not None
        message = replies.ChatMessage(
            role="assistant", content=content or (None if calls or reasoning else ""), refusal=None
        )
        if reasoning:
            message.reasoning_content = reasoning
        if calls:
            message.tool_calls = [_without_index(call) for call in calls]
        return replies.ChatChoice(
            index=index,
            message=message,
            logprobs=None if self._alternatives is None else replies.ChatLogprobs(content=logprobs),
            finish_reason=finish,
        )

    def _chunk(
        self,
        index: int,
        delta: replies.ChatDelta,
        logprobs: replies.ChatLogprobs | None,
        finish: replies.FinishReason | None,
    ) -> replies.ChatCompletionChunk:
        choice = replies.ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return replies.ChatCompletionChunk(
            object="chat.completion.chunk", choices=[choice], **self._head, **self._usage
        )


class _Message:
    """One answer while it comes."""

    def __init__(self, info: pb.ModelInfoReply, schemas: Schemas) -> None:
        self.calls = 0
        self._thinks = info.reasoning_form == "think"
        self._reasoning: ReasoningSplitter | None = None  # the first event says how it begins
        form = info.tool_call_form if schemas else ""
        self._tools = ToolCallSplitter(form, schemas) if form else None

    def add(self, event: pb.GenerateEvent) -> dict[str, Any]:
        """Fields of a delta."""
        if self._thinks and self._reasoning is None:
            self._reasoning = ReasoningSplitter(event.in_reasoning)
        reasoning, content = "", event.delta.text
        if self._reasoning is not None:
            reasoning, content = self._reasoning.push(content)
            if event.HasField("finish"):
                rest, text = self._reasoning.flush()
                reasoning, content = reasoning + rest, content + text
        calls: list[ToolCall] = []
        if self._tools is not None:
            content, calls = self._tools.push(content)
            if event.HasField("finish"):
                text, more = self._tools.flush(complete=event.finish.reason != "length")
                content, calls = content + text, calls + more
        fields = {"reasoning_content": reasoning, "content": content, "tool_calls": self._numbered(calls)}
        return {name: value for name, value in fields.items() if value}

    def _numbered(self, calls: Sequence[ToolCall]) -> list[replies.ToolCall]:
        first, self.calls = self.calls, self.calls + len(calls)
        return [
            replies.ToolCall(
                index=first + n,
                id=call.id,
                type="function",
                function=replies.FunctionCall(name=call.name, arguments=call.arguments),
            )
            for n, call in enumerate(calls)
        ]


def _without_index(call: replies.ToolCall) -> replies.ToolCall:
    """Only streams number calls."""
    return replies.ToolCall(id=call.id, type=call.type, function=call.function)
