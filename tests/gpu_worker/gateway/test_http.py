"""HTTP without anybody's client library: leaving, limits, keys, request ids, draining, and odd bodies."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from gpu_worker.gateway import middleware, responding
from tests.helpers.gateways import (
    CHATS,
    COMPLETIONS,
    WAIT,
    LoopThread,
    ScriptedWorker,
    Served,
    call,
    delta,
    endless,
    events,
    finish,
    says,
    serving,
)


def start(served: Served, **body: Any) -> socket.socket:
    """A completion request on its way."""
    data = json.dumps({"prompt": "x", **body})
    raw = socket.create_connection(("127.0.0.1", served.port), timeout=WAIT)
    raw.sendall(_head(len(data)) + data.encode())
    return raw


def _head(length: int) -> bytes:
    fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    return f"POST {COMPLETIONS} HTTP/1.1\r\n{fields}".encode()


def read_until(raw: socket.socket, text: bytes) -> bytes:
    got = b""
    while text not in got:
        piece = raw.recv(1 << 16)
        assert piece, got
        got += piece
    return got


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels(served: Served, worker: ScriptedWorker, stream: bool) -> None:
    worker.script = endless()
    with start(served, stream=stream) as raw:
        if stream:
            read_until(raw, b'"text":"x"')
        else:
            time.sleep(0.1)  # so that it was asked for
    assert worker.cancelled.acquire(timeout=1.0)


def test_a_client_that_leaves_while_nothing_comes(served: Served, worker: ScriptedWorker) -> None:
    """As in the queue, or during a long prompt."""
    worker.script = endless(pause=60)
    with start(served, stream=True) as raw:
        read_until(raw, b"data:")
    assert worker.cancelled.acquire(timeout=1.0)


def test_a_client_that_does_not_read_is_not_read_ahead_for(served: Served, worker: ScriptedWorker) -> None:
    told = 0

    async def answer(request: Any) -> Any:
        nonlocal told
        while True:
            yield delta("x" * 10_000)
            told += 1

    worker.script = answer
    with start(served, stream=True):
        steady = 0
        while steady < 4:
            before = told
            time.sleep(0.3)
            steady = steady + 1 if told == before > 0 else 0
            assert told < 3_000  # which all buffers on the way do not hold
    assert worker.cancelled.acquire(timeout=WAIT)


def test_request_ids(served: Served, worker: ScriptedWorker) -> None:
    _, headers, _ = call(served, "POST", COMPLETIONS, {"prompt": "x"}, {"X-Request-Id": "mine-1"})
    assert headers["x-request-id"] == worker.metadata[-1]["x-request-id"] == "mine-1"
    _, headers, _ = call(served, "POST", COMPLETIONS, {"prompt": "x"}, {"X-Request-Id": "not fit"})
    assert headers["x-request-id"] == worker.metadata[-1]["x-request-id"] != "not fit"
    _, headers, _ = call(served, "GET", "/nowhere")
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text"),
    [
        ("GET", "/v1/nowhere", None, 404, "unknown URL: GET /v1/nowhere"),
        ("GET", COMPLETIONS, None, 405, "GET is not allowed"),
        ("POST", COMPLETIONS, "{broken", 400, "is not JSON"),
        ("POST", COMPLETIONS, "", 400, "send a JSON object"),
        ("POST", COMPLETIONS, "[1]", 400, "send a JSON object"),
        ("POST", COMPLETIONS, b"\xff\xfe{}", 400, "JSON"),
        ("POST", COMPLETIONS, "[" * 100_000, 400, "parsing the body"),
        ("POST", COMPLETIONS, '{"prompt": "\\ud800"}', 400, "cannot be passed on"),
        ("POST", COMPLETIONS, '{"prompt": "x", "temperature": NaN}', 400, "temperature"),
        ("POST", COMPLETIONS, {"prompt": "x", "model": "\ud800"}, 404, "does not exist"),
        ("POST", COMPLETIONS, {"prompt": "x", "\ud800": 1}, 400, "valid string"),
        ("POST", COMPLETIONS, {f"x{n}": n for n in range(10_000)}, 400, "unrecognized request argument: x0"),
        ("POST", COMPLETIONS, {"prompt": ["x", *range(100_000)]}, 400, "prompt"),
        ("POST", CHATS, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "cannot be passed on"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "",
)  # fmt: skip
def test_odd_requests(
    served: Served, worker: ScriptedWorker, method: str, path: str, body: Any, status: int, text: str
) -> None:
    got, headers, reply = call(served, method, path, body)
    assert (got, set(reply)) == (status, {"error"})
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert text in reply["error"]["message"]
    assert ("allow" in headers) == (status == 405)


def test_deep_tools(served: Served, worker: ScriptedWorker) -> None:
    """Deeper than JSON can be written, not deeper than it can be read."""
    body = {"messages": [{"role": "user", "content": "x"}], "tools": []}
    text = json.dumps(body).replace("[]}", '[{"type":"function","function":{"name":"f","parameters":%s}}]}')
    for depth in (100, 900, 5_000, 100_000):
        status, _, _ = call(served, "POST", CHATS, text % ('{"a":' * depth + "1" + "}" * depth))
        assert status in (200, 400)


def test_a_body_that_is_too_long(
    served: Served, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "MAX_BODY_BYTES", 1000)
    status, headers, reply = call(served, "POST", COMPLETIONS, {"prompt": "x" * 1000})
    assert (status, headers["connection"]) == (413, "close")
    assert "more than" in reply["error"]["message"]
    pieces = (b'{"prompt": "' + b"x" * 900, b"x" * 900 + b'"}')
    status, _, _ = call(served, "POST", COMPLETIONS, iter(pieces), {"Transfer-Encoding": "chunked"})
    assert status == 413
    assert not worker.requests


def test_a_body_that_does_not_come(
    served: Served, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "BODY_TIMEOUT", 0.2)
    with socket.create_connection(("127.0.0.1", served.port), timeout=WAIT) as raw:
        raw.sendall(_head(9) + b"{")
        assert b" 408 " in read_until(raw, b"did not come within")


def test_metrics(served: Served, worker: ScriptedWorker) -> None:
    def value(name: str) -> float:
        _, headers, page = call(served, "GET", "/metrics")
        assert headers["content-type"].startswith("text/plain")
        return next((float(line.split()[-1]) for line in page.splitlines() if line.startswith(name)), 0.0)

    names = [
        'expert_serving_gateway_requests_total{route="/v1/completions",status="200"}',
        'expert_serving_gateway_time_to_first_token_seconds_count{route="/v1/completions"}',
        'expert_serving_gateway_request_duration_seconds_count{route="/v1/completions"}',
        "expert_serving_gateway_prompt_tokens_total",
        "expert_serving_gateway_completion_tokens_total",
        'expert_serving_gateway_requests_total{route="/v1/completions",status="499"}',
    ]
    before = [value(name) for name in names]
    worker.script = events(delta("a"), delta("b"), finish(prompt=5, tokens=2))
    call(served, "POST", COMPLETIONS, {"prompt": "x", "stream": True})
    worker.script = endless()
    start(served).close()
    deadline = time.monotonic() + WAIT
    while value(names[-1]) == before[-1] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [value(name) - was for name, was in zip(names, before, strict=True)] == [1, 1, 2, 5, 2, 1]
    assert value("expert_serving_gateway_requests_running") == 0


def test_health(served: Served, worker: ScriptedWorker) -> None:
    assert call(served, "GET", "/health")[::2] == (200, {"status": "serving"})
    served.loop.run(served.rpc.set_serving(False))
    try:
        status, headers, reply = call(served, "GET", "/health")
        assert (status, reply) == (503, {"status": "unavailable"}) and headers["retry-after"]
    finally:
        served.loop.run(served.rpc.set_serving(True))


def test_the_schema_can_be_had(served: Served, worker: ScriptedWorker) -> None:
    status, _, schema = call(served, "GET", "/openapi.json")
    assert status == 200
    assert set(schema["paths"]) == {
        "/v1/models", "/v1/models/{model_id}", COMPLETIONS, CHATS, "/health", "/metrics",
    }  # fmt: skip
    assert schema["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False


def test_the_time_of_a_request_is_bounded(loop: LoopThread, tmp_path: Path) -> None:
    with serving(loop, tmp_path, request_timeout=0.3) as served:
        served.worker.script = endless()
        status, _, reply = call(served, "POST", COMPLETIONS, {"prompt": "x"})
        assert (status, reply["error"]["code"]) == (504, "timeout")
        _, _, text = call(served, "POST", COMPLETIONS, {"prompt": "x", "stream": True})
        assert '"code": "timeout"' in text.splitlines()[-2]
        assert served.worker.cancelled.acquire(timeout=1.0) and served.worker.cancelled.acquire(timeout=1.0)


def test_a_client_that_does_not_take_its_answer_is_left(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responding, "_GRACE", 0.2)
    with serving(loop, tmp_path, request_timeout=0.5) as served:
        served.worker.script = says(*["x" * 100_000] * 1000)
        with start(served, stream=True):
            assert served.worker.cancelled.acquire(timeout=WAIT)
            time.sleep(0.5)
            assert loop.run(drained_at_once(served)) is True


async def drained_at_once(served: Served) -> bool:
    return await served.gateway.drain(0.01)


def test_a_bug_is_no_secret_and_tells_none(
    served: Served, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(*_: object) -> None:
        raise RuntimeError("the secret")

    monkeypatch.setattr(served.gateway, "model", fails)
    status, headers, reply = call(served, "GET", "/v1/models", headers={"X-Request-Id": "mine"})
    assert (status, headers["x-request-id"], reply["error"]["type"]) == (500, "mine", "server_error")
    assert "secret" not in str(reply) and "the secret" in caplog.text


def test_a_checkpoint_without_a_tokenizer(served: Served, worker: ScriptedWorker) -> None:
    worker.info.has_tokenizer = False
    try:
        status, _, reply = call(served, "POST", COMPLETIONS, {"prompt": [1, 2]})
    finally:
        worker.info.has_tokenizer = True
    assert status == 400 and "no tokenizer" in reply["error"]["message"]


def test_draining_finishes_what_there_is(loop: LoopThread, tmp_path: Path) -> None:
    with serving(loop, tmp_path) as served:
        served.worker.script = slowly = Slowly()
        with start(served, stream=True) as raw:
            read_until(raw, b'"text":"x"')
            drained = loop.start(served.gateway.drain(WAIT))
            while not served.gateway.draining:
                time.sleep(0.01)
            status, headers, reply = call(served, "POST", COMPLETIONS, {"prompt": "x"})
            assert (status, reply["error"]["code"]) == (503, "service_unavailable") and headers["retry-after"]
            assert call(served, "GET", "/health")[::2] == (503, {"status": "draining"})
            assert not drained.done()
            slowly.end = True
            read_until(raw, b"[DONE]")
        assert drained.result(WAIT) is True


def test_what_does_not_finish_is_told_so(loop: LoopThread, tmp_path: Path) -> None:
    with serving(loop, tmp_path) as served:
        served.worker.script = endless()
        with start(served, stream=True) as raw:
            read_until(raw, b'"text":"x"')
            assert loop.run(served.gateway.drain(0.1)) is False
            assert b"the gateway ends" in read_until(raw, b"\r\n0\r\n\r\n")
        assert served.worker.cancelled.acquire(timeout=1.0)


class Slowly:
    """A script that goes on until told to end."""

    def __init__(self) -> None:
        self.end = False

    async def __call__(self, request: Any) -> Any:
        async for event in endless()(request):
            yield event
            if self.end:
                yield finish()
                return
