"""Whole answers of many pieces: each piece is looked at once, however many answers there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.gateway import replies
from gpu_worker.gateway.answers import Answers, UsageCount
from gpu_worker.gateway.chats import Chats
from gpu_worker.gateway.completions import Completions
from gpu_worker.gateway.requests import ChatRequest, CompletionRequest
from tests.helpers.gateways import delta, finish

ANSWERS = 5


class Counted(list[Any]):
    """Pieces, and how often they were gone through."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return super().__iter__()


def whole(answers: Answers) -> tuple[Any, int]:
    """Of answers whose pieces come in turns."""
    parts = [[delta(f"{part}.{n}", index=n) for n in range(ANSWERS)] for part in range(3)]
    ends = [finish(index=n) for n in reversed(range(ANSWERS))]
    pieces = Counted(answers.add(0, event) for turn in (*parts, ends) for event in turn)
    return answers.whole(pieces, UsageCount().total()), pieces.passes


def texts(said: Iterator[tuple[int, str]]) -> bool:
    return list(said) == [(n, f"0.{n}1.{n}2.{n}") for n in range(ANSWERS)]


def test_completions() -> None:
    request = CompletionRequest.model_validate({"prompt": "x", "n": ANSWERS})
    reply, passes = whole(Completions(request, 1, "m", False))
    assert isinstance(reply, replies.Completion) and passes == 1
    assert texts((choice.index, choice.text) for choice in reply.choices)


def test_chats() -> None:
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "n": ANSWERS})
    reply, passes = whole(Chats(request, pb.ModelInfoReply(), "m", False))
    assert isinstance(reply, replies.ChatCompletion) and passes == 1
    assert texts((choice.index, choice.message.content or "") for choice in reply.choices)
