"""OpenAI's own client: the gateway understands what it sends, and it understands what comes back."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from common.rpc import gpu_worker_pb2 as pb
from tests.helpers.gateways import MODEL, ScriptedWorker, delta, events, finish, says

USER = [{"role": "user", "content": "What is a slot?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
XML_CALL = """\
<tool_call>
<function=weather>
<parameter=city>
{}
</parameter>
<parameter=days>
2
</parameter>
</function>
</tool_call>
"""


def letters(text: str) -> list[str]:
    """Pieces that cut every mark."""
    return [text[at : at + 2] for at in range(0, len(text), 2)]


def test_models(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_a_completion(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    worker.script = events(delta("Hello"), delta(" there"), finish(prompt=7, tokens=3, cached=4))
    done = client.completions.create(
        model=MODEL, prompt="Say hello", max_tokens=5, seed=-1, stop=["x"], temperature=0
    )
    assert (done.choices[0].text, done.choices[0].finish_reason, done.choices[0].logprobs) == (
        "Hello there", "stop", None,
    )  # fmt: skip
    assert done.usage is not None and done.usage.prompt_tokens_details is not None
    usage = (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens)
    assert (*usage, done.usage.prompt_tokens_details.cached_tokens) == (7, 3, 10, 4)
    (asked,) = worker.requests
    sampling = pb.SamplingParams(temperature=0, max_new_tokens=5, seed=(1 << 64) - 1, stop=["x"])
    assert (asked.text, asked.sampling) == ("Say hello", sampling)


def test_a_streamed_completion(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    stream = client.completions.create(model=MODEL, prompt=[1, 2], stream=True)
    pieces = [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in stream]
    assert pieces == [("Hello", None), (" there", None), ("", "stop")]
    assert list(worker.requests[0].token_ids.ids) == [1, 2]
    assert worker.requests[0].sampling.max_new_tokens == 16  # OpenAI's default
    assert worker.requests[0].sampling.temperature == 1


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_answers(client: openai.OpenAI, worker: ScriptedWorker, stream: bool) -> None:
    async def answer(request: pb.GenerateRequest) -> Any:
        for index in reversed(range(request.samples)):
            yield delta(f"{request.text}{index}", index=index)
            yield finish(index=index, prompt=len(request.text), tokens=1, cached=index + 1)

    worker.script = answer
    options: dict[str, Any] = {"model": MODEL, "prompt": ["aa", "b"], "n": 2}
    if stream:
        chunks = list(
            client.completions.create(**options, stream=True, stream_options={"include_usage": True})
        )
        texts = {c.choices[0].index: c.choices[0].text for c in chunks if c.choices and c.choices[0].text}
        usage = chunks[-1].usage
        assert [bool(chunk.choices) for chunk in chunks] == [True] * 8 + [False]
    else:
        done = client.completions.create(**options)
        texts, usage = {choice.index: choice.text for choice in done.choices}, done.usage
    assert texts == {0: "aa0", 1: "aa1", 2: "b0", 3: "b1"}
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 4)  # a prompt counts once
    assert usage.prompt_tokens_details.cached_tokens == 2


def test_a_chat_as_the_worker_gets_it(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 2}'}}
    client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "tool_calls": [call]},  # type: ignore[list-item]
            {"role": "tool", "tool_call_id": "c1", "content": "Rain"},
        ],
        tools=[WEATHER],  # type: ignore[list-item]
        top_p=0.5,
        extra_body={
            "top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5, "ignore_eos": True, "priority": -2,
            "chat_template_kwargs": {"enable_thinking": False},
        },
    )  # fmt: skip
    (asked,) = worker.requests
    chat = asked.chat
    assert [(m.role, m.content) for m in chat.messages] == [
        ("system", "Be brief."), ("user", "One\ntwo"), ("assistant", ""), ("tool", "Rain"),
    ]  # fmt: skip
    fields = [json.loads(message.fields_json or "{}") for message in chat.messages]
    as_object = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"days": 2}}}
    assert fields == [{}, {}, {"tool_calls": [as_object]}, {"tool_call_id": "c1"}]
    assert json.loads(chat.tools_json) == [WEATHER]
    assert json.loads(chat.template_arguments_json) == {"enable_thinking": False}
    assert asked.priority == -2
    assert asked.sampling == pb.SamplingParams(
        temperature=1, top_k=3, top_p=0.5, min_p=0.25, repetition_penalty=1.5, max_new_tokens=1000,
        ignore_eos=True, lower_to_allowed=True,
    )  # fmt: skip


def test_reasoning_and_tool_calls(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    worker.info.tool_call_form, worker.info.reasoning_form = "xml", "think"
    calls = XML_CALL.format("Berlin") + XML_CALL.format("Prag")
    worker.script = says(*letters(f"I need both.\n</think>\n\nLet me look.\n\n{calls}"), in_reasoning=True)
    options: dict[str, Any] = {"model": MODEL, "messages": USER, "tools": [WEATHER]}

    done = client.chat.completions.create(**options).choices[0]
    assert done.finish_reason == "tool_calls" and done.message.content == "Let me look."
    assert done.message.reasoning_content == "I need both."  # type: ignore[attr-defined] # not OpenAI's
    assert done.message.tool_calls is not None
    told = [(c.type, c.function.name, json.loads(c.function.arguments)) for c in done.message.tool_calls]
    assert told == [("function", "weather", {"city": city, "days": 2}) for city in ("Berlin", "Prag")]
    assert len({call.id for call in done.message.tool_calls}) == 2

    with client.chat.completions.stream(**options) as stream:  # which puts a message together by itself
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls" and streamed.message.content == "Let me look."
    assert streamed.message.tool_calls is not None
    assert [
        (c.type, c.function.name, json.loads(c.function.arguments)) for c in streamed.message.tool_calls
    ] == told
    pieces = [chunk.choices[0].delta for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(getattr(piece, "reasoning_content", "") for piece in pieces) == "I need both."

    sent_back = client.chat.completions.create(**{**options, "messages": [*USER, done.message.model_dump()]})
    assert sent_back.choices[0].finish_reason == "tool_calls"


def test_tools_that_are_not_to_be_called(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    worker.info.tool_call_form = "xml"
    worker.script = says(XML_CALL.format("Berlin"))
    options: dict[str, Any] = {"model": MODEL, "messages": USER}
    for choice in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        message = client.chat.completions.create(**options, **choice).choices[0].message
        assert (message.content, message.tool_calls) == (XML_CALL.format("Berlin"), None)
        assert worker.requests[-1].chat.tools_json == ""


def test_a_call_that_was_cut_off_is_text(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    worker.info.tool_call_form = "json"
    worker.script = says('<tool_call>{"name": "weather", "arguments": {}}', reason="length")
    options: dict[str, Any] = {"model": MODEL, "messages": USER, "tools": [WEATHER]}
    done = client.chat.completions.create(**options).choices[0]
    assert (done.finish_reason, done.message.tool_calls) == ("length", None)
    assert done.message.content == '<tool_call>{"name": "weather", "arguments": {}}'


def test_neutral_values_are_taken(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    neutral: dict[str, Any] = {
        "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "n": 1, "user": "me", "store": False,
        "response_format": {"type": "text"}, "tool_choice": "auto", "parallel_tool_calls": True,
        "metadata": {"a": "b"}, "service_tier": "auto", "stop": None, "logprobs": False,
        "modalities": ["text"],
    }  # fmt: skip
    client.chat.completions.create(model=MODEL, messages=USER, **neutral)
    client.completions.create(model=MODEL, prompt="x", echo=False, best_of=1, suffix="", logprobs=None)
    assert len(worker.requests) == 2
