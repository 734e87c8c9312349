"""The service of a whole worker in this process, asked by gRPC: what becomes of clients that leave, that
stand still or that ask wrongly, and of everybody else meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.api_keys import add_key
from common.credentials import Credentials
from common.errors import DeadlineExceeded, Exhausted, Incompatible, InvalidRequest, PermissionDenied
from common.grpc_client import channel_to, wait_until_serving
from common.rpc import expert_store_pb2 as store_pb
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.expert_store_pb2_grpc import ExpertStoreStub
from common.rpc.gpu_worker_pb2_grpc import GpuWorkerStub
from gpu_worker import jobs, outbox
from gpu_worker.client import WorkerClient, chat
from tests.helpers.workers import LocalWorker, QuietLink, local_worker

LONG: dict[str, Any] = {"max_new_tokens": 500, "ignore_eos": True}
PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def shared(quiet_link: QuietLink, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalWorker]:
    with local_worker(quiet_link, tmp_path_factory.mktemp("run"), max_sequences=2) as worker:
        yield worker


@pytest.fixture
def worker(shared: LocalWorker) -> Iterator[LocalWorker]:
    """The shared worker, whose every place is free before and after."""
    shared.step_seconds = 0.0
    yield shared
    shared.eventually_idle()


def answer(worker: LocalWorker, count: int = 5) -> list[int]:
    with worker.client() as client:
        return client.answers(PROMPT, max_new_tokens=count, ignore_eos=True)[0].token_ids


def test_a_deadline_ends_a_request_within_a_step(worker: LocalWorker) -> None:
    """The engine is held in a step while the time runs out: there is no other one after it."""
    counted = ended(worker, "deadline")
    worker.step_seconds = 0.005
    with worker.client() as client:
        stream = client.generate(PROMPT, timeout=3, **LONG)
        next(stream)
        with worker.pause:
            with pytest.raises(DeadlineExceeded):
                list(stream)
            wait_for_no_calls(worker)
            steps = worker.steps
    worker.eventually_idle()
    assert worker.steps <= steps + 1  # the one that was held
    assert ended(worker, "deadline") == counted + 1


def test_a_client_that_leaves_is_let_go_within_a_step(worker: LocalWorker) -> None:
    before, counted = stats(worker).requests_cancelled, ended(worker, "cancelled")
    with worker.client() as client:
        stream = client.generate(PROMPT, **LONG)
        next(stream)
        with worker.pause:
            client.close()  # the connection, not the call
            wait_for_no_calls(worker)
            steps = worker.steps
    worker.eventually_idle()
    assert worker.steps <= steps + 1
    assert stats(worker).requests_cancelled == before + 1
    assert ended(worker, "cancelled") == counted + 1


def test_a_deadline_holds_for_those_who_wait(worker: LocalWorker) -> None:
    """Both places are taken; the queue is left as soon as there is a step."""
    worker.step_seconds = 0.005
    with worker.client() as client:
        streams = [client.generate(PROMPT, **LONG) for _ in range(2)]
        for stream in streams:
            next(stream)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.answers(PROMPT, timeout=0.2, **LONG)
        assert time.monotonic() - started < 5
        deadline = time.monotonic() + 20
        while stats(worker).waiting:
            assert time.monotonic() < deadline
        assert stats(worker).running == 2
        for stream in streams:
            stream.close()


def test_a_client_that_does_not_read_stalls_nobody_and_is_told(
    worker: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its window holds 1 KiB; what does not fit is kept up to a bound, where the request ends."""
    monkeypatch.setattr(outbox, "MOST_UNREAD", 16)
    expected = answer(worker)
    before = stats(worker).requests_unread
    window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    with grpc.insecure_channel(str(worker.address), options=window) as channel:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=PROMPT), sampling=pb.SamplingParams(logprobs=20, **LONG)
        )
        stream = GpuWorkerStub(channel).Generate(request)
        read = [next(stream)]
        deadline = time.monotonic() + 20
        while stats(worker).requests_unread == before:
            assert answer(worker) == expected
            assert time.monotonic() < deadline, "it was not noticed"
        while stats(worker).running:
            assert time.monotonic() < deadline, "it has its place still"
        with pytest.raises(grpc.RpcError) as failure:
            read += stream
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "left 16 messages of its stream unread" in failure.value.details()
    assert 16 < len(read) < 100
    assert not any(event.HasField("finish") for event in read)


@pytest.mark.parametrize("given", ["mine-1", None, "no spaces", "x" * 129])
def test_a_request_has_an_id(worker: LocalWorker, given: str | None) -> None:
    """The client's, or a new one where it has none that can be shown; it comes first of all."""
    with grpc.insecure_channel(str(worker.address)) as channel:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=PROMPT), sampling=pb.SamplingParams(max_new_tokens=1)
        )
        call = GpuWorkerStub(channel).Generate(request, metadata=[("x-request-id", given)] if given else [])
        told = {item.key: item.value for item in call.initial_metadata()}["x-request-id"]
        assert told == given if given == "mine-1" else len(told) == 32
        list(call)


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ([], {}, "the prompt is empty"),
        ([96], {}, "token id 96 is outside the vocabulary of 96"),
        (
            [1] * 512 + [96],
            {},
            r"has 513 tokens; this worker's context takes at most 512: shorten it$",
        ),
        ("text", {}, "has no tokenizer; send token ids"),
        (chat([{"role": "user", "content": "hi"}]), {}, "has no tokenizer; send token ids"),
        ([1], {"samples": 129}, "samples must be at most 128, not 129"),
        ([1], {"stop": ["x"]}, "stop strings need a tokenizer"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_wrong_requests_are_told_what_to_change(
    worker: LocalWorker, prompt: Any, options: dict[str, Any], text: str
) -> None:
    with worker.client() as client, pytest.raises(InvalidRequest, match=text):
        client.answers(prompt, **options)


def test_a_text_to_score_has_tokens_of_the_model_and_not_too_many(
    worker: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker.client() as client:
        with pytest.raises(InvalidRequest, match="token id 96 is outside the vocabulary of 96"):
            list(client.score([1, 96]))
        monkeypatch.setattr(jobs, "MOST_SCORED", 8)
        assert list(client.score([1] * 8))
        with pytest.raises(InvalidRequest, match="the text has 9 tokens; at most 8 are scored"):
            list(client.score([1] * 8 + [96]))


def test_another_protocol_is_refused(worker: LocalWorker) -> None:
    with grpc.insecure_channel(str(worker.address)) as channel:
        request = pb.GenerateRequest(protocol_version=999, token_ids=pb.TokenIds(ids=PROMPT))
        with pytest.raises(grpc.RpcError) as failure:
            list(GpuWorkerStub(channel).Generate(request))
    assert failure.value.code() is Incompatible.status
    assert "the client 999" in failure.value.details()


@pytest.mark.parametrize("method", ["Generate", "Score", "Stats", "Stop"])
def test_what_is_no_message_is_the_callers_mistake(worker: LocalWorker, method: str) -> None:
    """It was an internal error once, with a traceback in the log."""
    path = f"/expert_serving.v1.GpuWorker/{method}"
    with grpc.insecure_channel(str(worker.address)) as channel:
        streams = method in ("Generate", "Score")
        call = channel.unary_stream(path) if streams else channel.unary_unary(path)
        with pytest.raises(grpc.RpcError) as failure:
            list(call(b"\xff\xff\xff"))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "not a message of this protocol" in failure.value.details()
    assert answer(worker, 1)


def test_a_queue_that_is_full_says_so(quiet_link: QuietLink, tmp_path: Path) -> None:
    with (
        local_worker(quiet_link, tmp_path, max_sequences=1, max_queue=0) as worker,
        worker.client() as client,
    ):
        worker.step_seconds = 0.005
        stream = client.generate(PROMPT, **LONG)
        next(stream)
        with pytest.raises(Exhausted, match="try again later"):
            answer(worker)
        stream.close()


def test_no_limit_given_is_the_limit_of_the_key(quiet_link: QuietLink, tmp_path: Path) -> None:
    """The default was refused once to whoever may have less."""
    keys = tmp_path / "keys.toml"
    alice = Credentials(api_key=add_key(keys, "alice", max_output_tokens=7))
    with (
        local_worker(quiet_link, tmp_path, api_keys=keys) as worker,
        WorkerClient(worker.address, credentials=alice) as client,
    ):
        for samples, given, count in ((1, {}, 7), (3, {}, 2), (1, {"max_new_tokens": 3}, 3)):
            answers = client.answers(PROMPT, samples=samples, ignore_eos=True, **given)
            assert [len(answer.token_ids) for answer in answers] == [count] * samples
        lowered = {"max_new_tokens": 300, "lower_to_allowed": True, "ignore_eos": True}
        assert len(client.answers(PROMPT, **lowered)[0].token_ids) == 7
        with pytest.raises(PermissionDenied, match="ask for 7 tokens a request, not for 300"):
            client.answers(PROMPT, max_new_tokens=300)
        with pytest.raises(PermissionDenied, match="lower max_new_tokens, or the number of samples"):
            client.answers(PROMPT, samples=8)


def test_health_is_told_by_the_services_name_too(worker: LocalWorker) -> None:
    with grpc.insecure_channel(str(worker.address)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "expert_serving.v1.GpuWorker"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_a_process_of_the_other_kind_is_told_apart(worker: LocalWorker) -> None:
    """A store is asked as a worker in a mistaken configuration; here, a worker as a store."""
    store = "expert_serving.v1.ExpertStore"
    with pytest.raises(Incompatible, match=f"is no {store}"):
        wait_until_serving(worker.address, 10, service=store)
    with (
        pytest.raises(Incompatible, match="does not know this call: an expert store where a GPU worker"),
        channel_to(worker.address) as channel,
    ):
        ExpertStoreStub(channel).Stats(store_pb.StoreStatsRequest())


def test_clients_take_addresses_as_the_command_line_does(
    worker: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WorkerClient(str(worker.address)) as client:
        assert client.serving()
    assert worker.address.socket_path is not None
    monkeypatch.setenv("EXPERT_SERVING_RUNTIME_DIR", str(worker.address.socket_path.parent))
    with WorkerClient() as client:
        assert client.serving()


def ended(worker: LocalWorker, outcome: str) -> float:
    """As the metrics have it."""
    assert worker.worker is not None
    labels = {"kind": "generate", "outcome": outcome}
    registry = worker.worker._service.metrics.registry
    return registry.get_sample_value("expert_serving_worker_requests_total", labels) or 0.0


def stats(worker: LocalWorker) -> pb.WorkerStats:
    with WorkerClient(worker.address) as client:
        return client.stats()


def wait_for_no_calls(worker: LocalWorker) -> None:
    assert worker.worker is not None
    deadline = time.monotonic() + 10
    while worker.worker.life.calls:
        assert time.monotonic() < deadline, "the call is open still"
        time.sleep(0.002)
