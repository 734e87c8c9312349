"""Log-probabilities as OpenAI's client gets them, of both shapes."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from common.rpc import gpu_worker_pb2 as pb
from tests.helpers.gateways import MODEL, ScriptedWorker, delta, events, finish

USER: Any = [{"role": "user", "content": "What is a slot?"}]


def token(piece: bytes, logprob: float, **alternatives: float) -> pb.Token:
    others = [pb.Alternative(piece=name.encode(), logprob=value) for name, value in alternatives.items()]
    return pb.Token(piece=piece, logprob=logprob, alternatives=others)


def euro() -> list[pb.GenerateEvent]:
    """A character in two tokens, and one token more."""
    first = token(b"\xe2\x82", -0.5)
    first.alternatives.add(piece=first.piece, logprob=-0.5)
    first.alternatives.add(piece=b"x", logprob=-2)
    second, third = token(b"\xac", -3, y=-0.25, z=-1), token(b"!", -1)
    third.alternatives.add(piece=b"!", logprob=-1)
    return [delta("", first), delta("€", second), delta("!", third), finish(tokens=3)]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_chats(client: openai.OpenAI, worker: ScriptedWorker, stream: bool) -> None:
    worker.script = events(*euro())
    options: dict[str, Any] = {"model": MODEL, "messages": USER, "logprobs": True, "top_logprobs": 1}
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        content = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    else:
        content = client.chat.completions.create(**options).choices[0].logprobs.content
    assert [(e.token, e.bytes, e.logprob) for e in content] == [
        ("\ufffd", [0xE2, 0x82], -0.5), ("\ufffd", [0xAC], -3), ("!", [0x21], -1),
    ]  # fmt: skip
    assert [[(t.token, t.logprob) for t in e.top_logprobs] for e in content] == [
        [("\ufffd", -0.5)], [("y", -0.25)], [("!", -1)],
    ]  # fmt: skip
    assert worker.requests[-1].sampling.logprobs == 1


def test_logprobs_without_alternatives(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    worker.script = events(*euro())
    chat = client.chat.completions.create(model=MODEL, messages=USER, logprobs=True).choices[0]
    assert chat.logprobs is not None and [e.top_logprobs for e in chat.logprobs.content] == [[], [], []]
    assert worker.requests[-1].sampling.logprobs == 1  # or there would be no pieces
    done = client.completions.create(model=MODEL, prompt="x", logprobs=0).choices[0]
    assert done.logprobs is not None and done.logprobs.top_logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(client: openai.OpenAI, worker: ScriptedWorker, stream: bool) -> None:
    worker.script = events(*euro())
    options: dict[str, Any] = {"model": MODEL, "prompt": "x", "logprobs": 2}
    if stream:
        parts = [c.choices[0].logprobs for c in client.completions.create(**options, stream=True)]
        parts = [part for part in parts if part is not None]
    else:
        parts = [client.completions.create(**options).choices[0].logprobs]
    tokens = [token for part in parts for token in part.tokens]
    assert tokens == ["bytes:\\xe2\\x82", "bytes:\\xac", "!"]
    assert [value for part in parts for value in part.token_logprobs] == [-0.5, -3, -1]
    assert [value for part in parts for value in part.text_offset] == [0, 0, 1]
    assert [value for part in parts for value in part.top_logprobs] == [
        {"bytes:\\xe2\\x82": -0.5, "x": -2}, {"y": -0.25, "z": -1, "bytes:\\xac": -3}, {"!": -1},
    ]  # fmt: skip
