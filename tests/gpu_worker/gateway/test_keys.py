"""API keys and their limits: the gateway's own, and those that the worker alone knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.api_keys import KeyRing, add_key
from common.errors import Exhausted
from tests.helpers.gateways import (
    CHATS,
    COMPLETIONS,
    LoopThread,
    ScriptedWorker,
    Served,
    call,
    events,
    serving,
)


def test_the_key_is_shown_to_the_worker(served: Served, worker: ScriptedWorker) -> None:
    call(served, "POST", COMPLETIONS, {"prompt": "x"}, {"Authorization": "Bearer abc"})
    assert worker.metadata[-1]["authorization"] == "Bearer abc"
    call(served, "POST", COMPLETIONS, {"prompt": "x"})
    assert "authorization" not in worker.metadata[-1]
    long = {"Authorization": f"Bearer {'x' * 20_000}"}  # more than gRPC takes, which said that we were busy
    assert call(served, "POST", COMPLETIONS, {"prompt": "x"}, long)[0] == 400


def test_keys(loop: LoopThread, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    shown = {
        "Authorization": f"Bearer {add_key(file, 'alice', max_output_tokens=100, requests_per_minute=3)}"
    }
    chat = {"messages": [{"role": "user", "content": "x"}]}
    with serving(loop, tmp_path, keys=KeyRing(file)) as served:
        for headers in ({}, {"Authorization": "Bearer es-wrong"}):
            for method, path in (("GET", "/v1/models"), ("POST", COMPLETIONS), ("GET", "/metrics")):
                status, answer, reply = call(served, method, path, headers=headers)
                assert (status, answer["www-authenticate"]) == (401, "Bearer")
                assert reply["error"]["code"] == "invalid_api_key"
        assert call(served, "GET", "/health")[0] == 200
        assert call(served, "GET", "/v1/models", headers=shown)[0] == 200
        assert call(served, "POST", CHATS, chat, shown)[0] == 200
        assert served.worker.requests[-1].sampling.max_new_tokens == 100  # what the key allows
        status, _, reply = call(served, "POST", COMPLETIONS, {"prompt": "x", "max_tokens": 60, "n": 2}, shown)
        assert status == 403 and "100 tokens" in reply["error"]["message"]
        assert call(served, "POST", COMPLETIONS, {"prompt": "x", "max_tokens": 100}, shown)[0] == 200
        status, headers, _ = call(served, "POST", COMPLETIONS, {"prompt": "x"}, shown)
        assert status == 429 and 50 < int(headers["retry-after"]) <= 60, "when the minute is over"


@pytest.mark.parametrize(
    ("path", "body", "most"),
    [
        (CHATS, {"messages": [{"role": "user", "content": "x"}]}, 1000),
        (COMPLETIONS, {"prompt": "x"}, 16),
    ],
)
def test_a_default_is_lowered_to_what_the_worker_allows(
    worker: ScriptedWorker, served: Served, path: str, body: dict[str, Any], most: int
) -> None:
    """It was refused once where keys are the worker's alone: the gateway does not know their limits."""
    for given in ({}, {"max_tokens": 7}):
        assert call(served, "POST", path, body | given)[0] == 200
    default, asked = (request.sampling for request in worker.requests)
    assert (default.max_new_tokens, default.lower_to_allowed) == (most, True)
    assert (asked.max_new_tokens, asked.lower_to_allowed) == (7, False)


def test_a_default_for_several_prompts_is_what_the_key_allows_for_all(
    loop: LoopThread, tmp_path: Path
) -> None:
    shown = {"Authorization": f"Bearer {add_key(tmp_path / 'keys.toml', 'alice', max_output_tokens=24)}"}
    with serving(loop, tmp_path, keys=KeyRing(tmp_path / "keys.toml")) as served:
        assert call(served, "POST", COMPLETIONS, {"prompt": ["x", "y"], "n": 2}, shown)[0] == 200
        assert [request.sampling.max_new_tokens for request in served.worker.requests] == [6, 6]


def test_each_prompt_counts_as_a_request_of_the_key(loop: LoopThread, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key = add_key(file, "alice", max_concurrent_requests=2, requests_per_minute=5)
    shown, keys = {"Authorization": f"Bearer {key}"}, KeyRing(file)
    with serving(loop, tmp_path, keys=keys) as served:
        for prompts, status, says in (
            (2, 200, ""),
            (3, 403, "2 requests at a time"),  # never mind the waiting; it counts as one
            (2, 200, ""),
            (1, 429, "5 requests a minute"),
        ):
            got, headers, reply = call(served, "POST", COMPLETIONS, {"prompt": ["x"] * prompts}, shown)
            assert got == status and says in str(reply)
        assert int(headers["retry-after"]) > 50
        assert len(served.worker.requests) == 4 and keys.find(shown["Authorization"]).running == 0


def test_the_workers_refusal_tells_when_to_try_again(worker: ScriptedWorker, served: Served) -> None:
    worker.script = events(Exhausted("2 requests a minute", retry_after=17))
    status, headers, _ = call(served, "POST", COMPLETIONS, {"prompt": "x"})
    assert (status, headers["retry-after"]) == (429, "17")
    assert worker.metadata[-1].get("x-requests-together") is None
    call(served, "POST", COMPLETIONS, {"prompt": ["x", "y"]})
    assert worker.metadata[-1]["x-requests-together"] == "2"
