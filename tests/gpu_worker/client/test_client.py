"""Both clients against a server of gRPC's own, which answers as it is told, dies, and comes back."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from common import origin
from common.addresses import Address
from common.credentials import Credentials
from common.errors import (
    ConfigError,
    DeadlineExceeded,
    Exhausted,
    InvalidRequest,
    ServingError,
    Unavailable,
)
from common.grpc_server import MAX_MESSAGE_BYTES
from gpu_worker.client import AsyncWorkerClient, Generated, WorkerClient, chat
from tests.helpers.certificates import Authority
from tests.helpers.fake_worker import FakeWorker, delta, endless, finish, hello, refusing, silent


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakeWorker]:
    worker = FakeWorker(Address.parse(f"unix:{tmp_path}/worker.sock"))
    worker.start()
    yield worker
    worker.die()


def ask(
    kind: str, address: Address, prompt: Any = "p", retry_for: float = 0.0, **options: Any
) -> list[Generated]:
    """A whole answer by either client."""
    if kind == "sync":
        with WorkerClient(address, retry_for=retry_for) as client:
            return client.answers(prompt, **options)

    async def asked() -> list[Generated]:
        async with AsyncWorkerClient(address, retry_for=retry_for) as client:
            return await client.answers(prompt, **options)

    return asyncio.run(asked())


both = pytest.mark.parametrize("kind", ["sync", "async"])


@both
def test_everything_that_is_asked_arrives(kind: str, worker: FakeWorker) -> None:
    answer = ask(kind, worker.address, [1, 2], priority=-3, request_id="abc", temperature=0.5, stop=["x"])
    assert (answer[0].text, answer[0].token_ids) == ("hello", [3, 2])
    request = worker.requests[0]
    assert (list(request.token_ids.ids), request.priority, request.samples) == ([1, 2], -3, 1)
    assert (request.sampling.temperature, list(request.sampling.stop)) == (0.5, ["x"])
    assert worker.metadata[0]["x-request-id"] == "abc"


@both
def test_samples_are_told_apart(kind: str, worker: FakeWorker) -> None:
    worker.answers = [lambda *_: iter([delta("b", 1), delta("a"), finish(), delta("c", 1), finish(1)])]
    assert [sample.text for sample in ask(kind, worker.address, samples=2)] == ["a", "bc"]


@both
def test_a_stream_that_ends_early_is_no_answer(kind: str, worker: FakeWorker) -> None:
    worker.answers = [lambda *_: iter([delta("a"), finish()])]
    with pytest.raises(Unavailable, match="without a result"):
        ask(kind, worker.address, samples=2)


def test_chats_carry_what_their_template_reads(worker: FakeWorker) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    ]
    ask("sync", worker.address, messages)
    ask("sync", worker.address, chat(messages[:1], [{"type": "function"}], enable_thinking=False))
    plain, rich = (request.chat for request in worker.requests)
    assert [(message.role, message.content) for message in plain.messages] == [
        ("user", "hi"),
        ("assistant", ""),
    ]
    assert json.loads(plain.messages[1].fields_json) == {"tool_calls": [{"id": "1"}]}
    assert (plain.messages[0].fields_json, plain.tools_json, plain.template_arguments_json) == ("", "", "")
    assert json.loads(rich.tools_json) == [{"type": "function"}]
    assert json.loads(rich.template_arguments_json) == {"enable_thinking": False}


def test_a_call_tells_for_whom_it_is(worker: FakeWorker) -> None:
    """What a gateway does: the id and trace of the request that it works for, and the key of its client."""
    trace = f"00-{'1' * 32}-{'2' * 16}-01"

    async def asked() -> None:
        credentials = Credentials(api_key="its-own")
        async with AsyncWorkerClient(worker.address, credentials=credentials) as client:
            with origin.working_for(origin.Origin(("id",), trace)):
                await client.answers("p")
                await client.showing("another").answers("p")

    asyncio.run(asked())
    told = [
        [call.get(key) for key in ("x-request-id", "traceparent", "authorization")]
        for call in worker.metadata
    ]
    assert told == [["id", trace, "Bearer its-own"], ["id", trace, "Bearer another"]]


def test_another_key_is_shown_without_a_look_at_the_files(worker: FakeWorker, tmp_path: Path) -> None:
    """It is shown at each request of a gateway, on its event loop."""
    authority = Authority(tmp_path)
    credentials = Credentials(authority.file, *authority.issue("gateway"))
    for file in (authority.file, credentials.tls_cert, credentials.tls_key):
        assert file is not None
        file.unlink()

    async def shown() -> Any:
        async with AsyncWorkerClient(worker.address, credentials=credentials) as client:
            with pytest.raises(ConfigError, match="no key has"):
                client.showing("es-\n")
            return await client.showing("another").answers("p")

    assert asyncio.run(shown())
    assert worker.metadata[-1]["authorization"] == "Bearer another"


@both
def test_a_worker_that_comes_back_is_asked_again(kind: str, worker: FakeWorker) -> None:
    worker.die()
    threading.Timer(0.7, worker.start).start()
    assert ask(kind, worker.address, retry_for=20)[0].text == "hello"


@both
def test_a_worker_that_drains_or_dies_before_its_answer_is_asked_again(kind: str, worker: FakeWorker) -> None:
    """A server that is interrupted cancels its calls."""
    dying = refusing(grpc.StatusCode.CANCELLED)
    worker.answers = [refusing(grpc.StatusCode.UNAVAILABLE, "draining"), dying, hello]
    assert ask(kind, worker.address, retry_for=20)[0].text == "hello"
    assert len(worker.requests) == 3


@both
def test_what_has_streamed_is_never_asked_again(kind: str, worker: FakeWorker) -> None:
    worker.answers = [refusing(grpc.StatusCode.UNAVAILABLE, "ends", after=1)]
    with pytest.raises(Unavailable, match="ends"):
        ask(kind, worker.address, retry_for=20)
    assert len(worker.requests) == 1


@both
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Exhausted),
        (grpc.StatusCode.INTERNAL, ServingError),
    ],
)
def test_other_errors_are_told_at_once(
    kind: str, worker: FakeWorker, status: grpc.StatusCode, expected: type[ServingError]
) -> None:
    worker.answers = [refusing(status)]
    with pytest.raises(expected, match="no"):
        ask(kind, worker.address, retry_for=20)
    assert len(worker.requests) == 1


@both
@pytest.mark.parametrize(("retry_for", "least", "most"), [(0, 0.0, 3.0), (0.8, 0.2, 5.0)])
def test_nobody_is_waited_for_longer_than_stated(
    kind: str, tmp_path: Path, retry_for: float, least: float, most: float
) -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable, match="is it running"):
        ask(kind, Address.parse(f"unix:{tmp_path}/none.sock"), retry_for=retry_for)
    assert least <= time.monotonic() - started < most


@both
def test_a_time_limit_holds_with_all_attempts(kind: str, worker: FakeWorker) -> None:
    worker.answers = [refusing(grpc.StatusCode.UNAVAILABLE), silent]
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="in full within the time given"):
        ask(kind, worker.address, retry_for=20, timeout=0.8)
    assert 0.7 < time.monotonic() - started < 10  # of the 20 that it is asked again
    assert len(worker.requests) == 2


@both
def test_closing_the_iterator_cancels_the_call(kind: str, worker: FakeWorker) -> None:
    async def ask_and_leave() -> None:
        async with AsyncWorkerClient(worker.address) as client:
            async with aclosing(client.generate("p")) as events:
                await anext(events)
            assert await asyncio.to_thread(worker.ended.acquire, timeout=20)

    worker.answers = [endless]
    if kind == "async":
        asyncio.run(ask_and_leave())
        return
    with WorkerClient(worker.address) as client:
        events = client.generate("p")
        next(events)
        events.close()
        assert worker.ended.acquire(timeout=20)


def test_nothing_is_sent_before_it_is_asked_for(worker: FakeWorker) -> None:
    with WorkerClient(worker.address) as client:
        client.generate("p")
        assert client.stats().running == 3
    assert worker.requests == []


def test_an_unknown_parameter_is_told_where_it_is_given(worker: FakeWorker) -> None:
    with WorkerClient(worker.address) as client, pytest.raises(ValueError, match="temprature"):
        client.generate("p", temprature=1.0)


def test_a_message_that_is_too_long_is_the_callers_mistake(worker: FakeWorker) -> None:
    """gRPC's own status for it says that a resource is used up, as if trying again helped."""
    with pytest.raises(InvalidRequest, match="a message may have 64 MiB at most"):
        ask("sync", worker.address, "x" * (MAX_MESSAGE_BYTES + 1))


def test_serving_is_what_health_says(worker: FakeWorker) -> None:
    async def serving(address: Address) -> bool:
        async with AsyncWorkerClient(address) as client:
            return await client.serving()

    for status in (health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING):
        worker.health.set("expert_serving.v1.GpuWorker", status)
        expected = status == health_pb2.HealthCheckResponse.SERVING
        with WorkerClient(worker.address) as client:
            assert client.serving() is expected
        assert asyncio.run(serving(worker.address)) is expected
    worker.die()
    assert not asyncio.run(serving(worker.address))
    worker.start()


def test_clients_do_without_pytorch() -> None:
    code = "import sys, gpu_worker.client; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
