"""What is refused, as OpenAI's client sees it: its exception, and the field that is named."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from common.errors import Exhausted, InvalidRequest, ServingError, Unavailable
from tests.helpers.gateways import MODEL, ScriptedWorker, delta, events

USER: Any = [{"role": "user", "content": "What is a slot?"}]
TOOL = {"type": "function", "function": {"name": "weather"}}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
LIST_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "[1]"}}


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [
        (InvalidRequest("the prompt is empty"), openai.BadRequestError, 400),
        (Exhausted("the queue is full"), openai.RateLimitError, 429),
        (Unavailable("the worker is draining"), openai.InternalServerError, 503),
        (ServingError("logits are no numbers"), openai.InternalServerError, 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_worker_refuses(
    client: openai.OpenAI,
    worker: ScriptedWorker,
    error: ServingError,
    raised: type[openai.APIStatusError],
    status: int,
    stream: bool,
) -> None:
    worker.script = events(error)
    with pytest.raises(raised, match=str(error)) as caught:
        client.chat.completions.create(model=MODEL, messages=USER, stream=stream)  # type: ignore[call-overload]
    assert caught.value.status_code == status
    assert ("retry-after" in caught.value.response.headers) == (status in (429, 503))


def test_what_the_worker_says_of_a_failure_stays_in_its_line(
    client: openai.OpenAI, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.script = events(ServingError("two\nlines"))
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL, prompt="x")
    assert "the worker failed: two\\nlines" in caplog.messages


@pytest.mark.parametrize("ending", [Unavailable("the device failed"), None])
def test_an_error_in_the_middle(
    client: openai.OpenAI, worker: ScriptedWorker, ending: ServingError | None
) -> None:
    """An answer without its end is an error, too."""
    script = [delta("Hel")] if ending is None else [delta("Hel"), ending]
    worker.script = events(*script)
    got: list[str] = []
    message = str(ending or "ended early")
    stream = client.completions.create(model=MODEL, prompt="x", stream=True)
    with pytest.raises(openai.APIError, match=message):
        got.extend(chunk.choices[0].text for chunk in stream)
    assert got == ["Hel"]
    with pytest.raises(openai.InternalServerError, match=message):
        client.completions.create(model=MODEL, prompt="x")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"seed": 1 << 63}, "seed"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": TOOL}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"top_logprobs": 2}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"functions": []}, "functions"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "messages[0]"),
        ({"messages": [IMAGE]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [LIST_CALL]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"extra_body": {"top_k": 1.5}}, "top_k"),
        ({"extra_body": {"no_such_thing": 1}}, "no_such_thing"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused(
    client: openai.OpenAI, worker: ScriptedWorker, options: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": USER, **options})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error" and caught.value.code
    assert not worker.requests


@pytest.mark.parametrize(
    "options",
    [
        {"echo": True},
        {"best_of": 2},
        {"suffix": "x"},
        {"logprobs": 6},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [1, -1]},
    ],
    ids=str,
)
def test_the_same_for_completions(
    client: openai.OpenAI, worker: ScriptedWorker, options: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": MODEL, "prompt": "x", **options})
    assert caught.value.param is not None and caught.value.param.startswith(next(iter(options)))


def test_another_model(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
