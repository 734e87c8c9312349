"""What is asked wrongly is refused: the thing is named, the status or exit code is right, and nobody dies."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import zmq
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from common.expert_key import ExpertKey
from common.messages import PROTOCOL_VERSION, Failed, Fault, Kind, request, unpack_reply
from common.rpc import expert_store_pb2, gpu_worker_pb2
from common.rpc.expert_store_pb2_grpc import ExpertStoreStub
from common.rpc.gpu_worker_pb2_grpc import GpuWorkerStub
from tests.system.processes import Pair, pair_of_processes

SHORT = 10.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, packed_model: Path) -> Iterator[Pair]:
    """One pair for all of this module: refusing must not harm it."""
    with pair_of_processes(tmp_path_factory.mktemp("run"), packed_model) as pair:
        pair.start_store()
        pair.start_worker("--slots", "4")
        yield pair


@pytest.fixture(autouse=True)
def both_live(pair: Pair) -> Iterator[None]:
    yield
    assert pair.generate([1, 2, 3], 2).finish is not None
    assert pair.store.popen.poll() is None


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--token-ids", "1,96"], "token id 96 is outside the vocabulary of 96"),
        (["--token-ids", "-1"], "-1 is not a token id"),
        (["--token-ids", "1,x"], "numbers separated by commas"),
        (["--token-ids", ""], "the prompt is empty"),
        (["--token-ids", ",".join(["1"] * 513)], "513 tokens; this worker's context takes at most 512"),
        (["hello"], "no tokenizer"),
        (["\udcff\udcfe"], "the prompt is not UTF-8"),  # as Python has bytes that are none
        (["--token-ids", "1", "--stop", "x"], "stop strings need a tokenizer"),
        (["--token-ids", "1", "--temperature", "-1"], "temperature"),
        (["--token-ids", "1", "--temperature", "nan"], "temperature"),
        (["--token-ids", "1", "--top-p", "0"], "top_p"),
        (["--token-ids", "1", "--top-p", "1.5"], "top_p"),
        (["--token-ids", "1", "--top-k", "-3"], "--top-k"),
        (["--token-ids", "1", "--min-p", "1"], "min_p"),
        (["--token-ids", "1", "--repetition-penalty", "0"], "repetition_penalty"),
        (["--token-ids", "1", "--seed", "-1"], "--seed"),
        (["--token-ids", "1", "--max-new-tokens", "0"], "max_new_tokens"),
    ],
)
def test_generate(pair: Pair, options: list[str], names: str) -> None:
    done = pair.run("gpu-worker", "generate", *options, check=False)
    assert done.returncode == 1
    assert names in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "code", "names"),
    [
        (["--token-ids", "1,2", "--window", "513"], 1, "window"),
        (["--token-ids", "1,2", "--window", "8", "--stride", "9"], 1, "stride"),
        (["--text", "/nonexistent/file"], 1, "/nonexistent/file"),
        ([], 2, "--text or --token-ids"),
    ],
)
def test_score(pair: Pair, options: list[str], code: int, names: str) -> None:
    done = pair.run("gpu-worker", "score", *options, check=False)
    assert done.returncode == code
    assert names in done.stderr


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (("expert-store", "start", "demo"), "already listens on"),
        (("gpu-worker", "start"), "already listens on"),
        (("expert-store", "start", "nobody-here", "--listen", "unix:other.sock"), "nobody-here"),
        (("expert-store", "start", "demo", "--listen", "nonsense"), "not an address"),
        (("expert-store", "start", "demo", "--ram", "lots"), "not a size"),
        (("gpu-worker", "start", "--listen", "unix:other.sock", "--slots", "0"), "--slots"),
        (("gpu-worker", "start", "--listen", "unix:other.sock", "--policy", "fifo"), "lru, lfru"),
        (("gpu-worker", "start", "--listen", "unix:other.sock", "--dtype", "int8"), "--dtype"),
        (("gpu-worker", "start", "--listen", "unix:other.sock", "--slots", "1", "--vram", "1GB"), "not both"),
        (
            ("gpu-worker", "start", "--listen", "unix:other.sock", "--vram", "10kB"),
            "smallest size that works",
        ),
        (("gpu-worker", "wait", "--worker", "unix:nobody.sock", "--timeout", "0.3"), "nothing answers"),
        (("expert-store", "stats", "--store", "unix:nobody.sock"), "is it running?"),
    ],
)
def test_commands(pair: Pair, command: tuple[str, ...], names: str) -> None:
    command = tuple(word.replace("unix:", f"unix:{pair.runtime}/") for word in command)
    done = pair.run(*command, check=False)
    assert done.returncode == 1, done.stderr
    assert names in " ".join(done.stderr.split())


def test_too_little_ram_for_one_record(pair: Pair, packed_model: Path, record_bytes: int) -> None:
    listen = f"unix:{pair.runtime}/small.sock"
    command = ("expert-store", "start", str(packed_model), "--listen", listen, "--ram", str(record_bytes - 1))
    done = pair.run(*command, check=False)
    assert done.returncode == 1
    assert "cannot hold one record" in done.stderr


def test_another_protocol_version(pair: Pair) -> None:
    with (
        grpc.insecure_channel(str(pair.worker_address)) as worker,
        grpc.insecure_channel(str(pair.store_address)) as store,
    ):
        generate = gpu_worker_pb2.GenerateRequest(protocol_version=99, text="x")
        with pytest.raises(grpc.RpcError) as refused:
            next(GpuWorkerStub(worker).Generate(generate, timeout=SHORT))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        attach = expert_store_pb2.AttachRequest(protocol_version=99, worker="x", pid=1)
        with pytest.raises(grpc.RpcError) as refused:
            ExpertStoreStub(store).Attach(attach, timeout=SHORT)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", Fault.MALFORMED),
        (b"\xff" * 100, Fault.MALFORMED),
        (request(Kind.STAGE, 7, 1, [ExpertKey(0, 0)])[:-1], Fault.MALFORMED),
        (request(Kind.STAGE, 7, 12345, [ExpertKey(0, 0)]), Fault.NO_LEASE),
    ],
)
def test_random_bytes_on_the_data_plane_get_one_reply(pair: Pair, data: bytes, fault: Fault) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(f"ipc://{pair.runtime}/store.sock.data")
        socket.send(data)
        assert socket.poll(SHORT * 1000)
        reply = unpack_reply(socket.recv())
        assert isinstance(reply, Failed)
        assert reply.fault is fault
        assert not socket.poll(100)


def test_an_expert_that_does_not_exist(pair: Pair) -> None:
    with (
        grpc.insecure_channel(str(pair.store_address)) as channel,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as socket,
    ):
        attach = expert_store_pb2.AttachRequest(protocol_version=PROTOCOL_VERSION, worker="test", pid=1)
        reply = ExpertStoreStub(channel).Attach(attach, timeout=SHORT)
        socket.connect(reply.data_endpoint)
        socket.send(request(Kind.STAGE, 3, reply.lease_id, [ExpertKey(4, 0)]))
        assert socket.poll(SHORT * 1000)
        failed = unpack_reply(socket.recv())
        assert isinstance(failed, Failed)
        assert (failed.request_id, failed.fault) == (3, Fault.NO_SUCH_EXPERT)


def test_standard_clients_find_health_and_reflection(pair: Pair) -> None:
    for address, service in (
        (pair.store_address, "expert_serving.v1.ExpertStore"),
        (pair.worker_address, "expert_serving.v1.GpuWorker"),
    ):
        with grpc.insecure_channel(str(address)) as channel:
            check = health_pb2.HealthCheckRequest()
            status = health_pb2_grpc.HealthStub(channel).Check(check, timeout=SHORT).status
            assert status == health_pb2.HealthCheckResponse.SERVING
            watch = health_pb2_grpc.HealthStub(channel).Watch(check, timeout=SHORT)
            assert next(iter(watch)).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
            assert service in ProtoReflectionDescriptorDatabase(channel).get_services()
