"""A real server and real clients over TCP: who gets in, with which certificate and which key."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common.addresses import Address
from common.api_keys import KeyRing, add_key
from common.credentials import NO_CREDENTIALS, Credentials
from common.errors import (
    ConfigError,
    Exhausted,
    InvalidRequest,
    PermissionDenied,
    ServingError,
    Unauthenticated,
    Unavailable,
)
from common.grpc_client import open_async_channel, translate, wait_until_serving
from common.grpc_server import RpcServer
from common.key_usage import TOGETHER, KeyUsage, check_allowance
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.gpu_worker_pb2_grpc import GpuWorkerServicer, GpuWorkerStub, add_GpuWorkerServicer_to_server
from common.statuses import retry_after
from common.tls import ServerTls
from tests.helpers.certificates import Authority


class Echo(GpuWorkerServicer):
    """Streams as many events as the prompt has tokens; the last when it is told to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.error: ServingError | None = None  # for whoever asks what the model is

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateEvent]:
        check_allowance(len(request.token_ids.ids), 1)
        for _ in request.token_ids.ids[1:]:
            yield pb.GenerateEvent()
        await self.go_on.wait()
        yield pb.GenerateEvent()

    async def ModelInfo(self, request: pb.ModelInfoRequest, context: Any) -> pb.ModelInfoReply:
        if self.error is not None:
            raise self.error
        return pb.ModelInfoReply(model="echo")

    async def Stop(self, request: pb.StopWorkerRequest, context: Any) -> pb.StopWorkerReply:
        return pb.StopWorkerReply()


@asynccontextmanager
async def serving(
    tls: ServerTls | None = None, keys: KeyRing | None = None
) -> AsyncIterator[tuple[Address, Echo]]:
    def fatal(error: BaseException) -> None:
        raise AssertionError("the server broke") from error

    listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)  # a free port
    port = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    server, echo = RpcServer(Address.parse(f"127.0.0.1:{port}"), fatal, tls, keys), Echo()
    add_GpuWorkerServicer_to_server(echo, server.server)
    await server.start("expert_serving.v1.GpuWorker")
    await server.set_serving(True)
    try:
        yield server.address, echo
    finally:
        await server.stop(0.1)


async def ask(address: Address, credentials: Credentials = NO_CREDENTIALS, method: str = "ModelInfo") -> Any:
    """One call; raises the translated error."""
    request = {
        "ModelInfo": pb.ModelInfoRequest(),
        "Stop": pb.StopWorkerRequest(),
        "Stats": pb.WorkerStatsRequest(),
    }[method]
    async with open_async_channel(address, credentials) as channel:
        try:
            return await getattr(GpuWorkerStub(channel), method)(
                request, timeout=10, metadata=credentials.metadata
            )
        except grpc.RpcError as error:
            raise translate(error, address) from None


def streaming(
    address: Address, credentials: Credentials, tokens: int = 2, *more: tuple[str, str]
) -> tuple[Any, Any]:
    """A channel, and a call on it that has been answered in part once its first event was read."""
    channel = open_async_channel(address, credentials)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(tokens)))
    return channel, GpuWorkerStub(channel).Generate(
        request, timeout=10, metadata=[*credentials.metadata, *more]
    )


def run(check: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(check())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def test_tls_and_what_a_client_without_it_is_told(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("127.0.0.1")
    other = Authority(tmp_path / "other")

    async def check() -> None:
        async with serving(ServerTls(cert, key, None)) as (address, _):
            assert (await ask(address, Credentials(authority.file))).model == "echo"
            with pytest.raises(Unavailable, match=r"no TLS connection to .*EXPERT_SERVING_TLS_CA"):
                await ask(address, Credentials(other.file))
            with pytest.raises(Unavailable, match=r"if it speaks TLS, set \$EXPERT_SERVING_TLS_CA"):
                await ask(address)
            with pytest.raises(Unavailable, match=r"not ready within .* no TLS connection to"):
                await asyncio.to_thread(wait_until_serving, address, 0.5, Credentials(other.file))

    run(check)


def test_mutual_tls(authority: Authority, tmp_path: Path) -> None:
    """The peer that is refused is told so only at its first call: in TLS 1.3 the server's word comes last."""
    cert, key = authority.issue("127.0.0.1")
    clients, strangers = Authority(tmp_path / "clients"), Authority(tmp_path / "strangers")

    async def check() -> None:
        async with serving(ServerTls(cert, key, clients.file)) as (address, _):
            assert (await ask(address, Credentials(authority.file, *clients.issue("alice")))).model == "echo"
            for credentials in (
                Credentials(authority.file),
                Credentials(authority.file, *strangers.issue("mallory")),
            ):
                with pytest.raises(Unavailable):
                    await ask(address, credentials)

    run(check)


def test_a_renewed_certificate_is_taken_up_and_a_broken_one_is_not(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = authority.issue("127.0.0.1")
    successor = Authority(tmp_path / "successor")
    served = tmp_path / "served.pem", tmp_path / "served.key"
    for path, made in zip(served, (cert, key), strict=True):
        path.write_bytes(made.read_bytes())

    async def check() -> None:
        async with serving(ServerTls(*served, None)) as (address, _):
            await ask(address, Credentials(authority.file))
            for path, made in zip(served, successor.issue("127.0.0.1"), strict=True):
                path.write_bytes(made.read_bytes())
            await ask(address, Credentials(successor.file))
            served[0].write_text("nonsense")
            await ask(address, Credentials(successor.file))

    with caplog.at_level(logging.ERROR):
        run(check)
    assert "stays as it was" in caplog.text


def test_files_that_are_no_certificates(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("127.0.0.1")
    other = Authority(tmp_path / "other").issue("127.0.0.1")[1]
    for pair in ((cert, other), (key, cert), (tmp_path / "none.pem", key)):
        with pytest.raises(ConfigError, match=r"cannot (use|read)"):
            ServerTls(*pair, None)
    with pytest.raises(ConfigError, match="cannot use the certificates of"):
        ServerTls(cert, key, key)
    with pytest.raises(ConfigError, match="go together"):
        Credentials(authority.file, tls_cert=cert)
    with pytest.raises(ConfigError, match="needs TLS"):
        Credentials(None, cert, key)
    for wrong in (Credentials(authority.file, cert, other), Credentials(key), Credentials(tmp_path / "none")):
        with pytest.raises(ConfigError, match="cannot use the certificate"):
            wrong.tls()


def test_credentials_come_from_the_environment(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = authority.issue("alice")
    for name, value in {
        "TLS_CA": authority.file,
        "TLS_CERT": cert,
        "TLS_KEY": key,
        "API_KEY": "es-1",
    }.items():
        monkeypatch.setenv(f"EXPERT_SERVING_{name}", str(value))
    credentials = Credentials.of_environment()
    assert credentials.tls() is not None
    assert credentials.metadata == [("authorization", "Bearer es-1")]
    assert "es-1" not in repr(credentials)
    monkeypatch.setenv("EXPERT_SERVING_API_KEY", "es-\n")
    with pytest.raises(ConfigError, match="no key has"):
        Credentials.of_environment()
    with pytest.raises(ConfigError, match="more than 1024 characters"):
        Credentials(api_key="x" * 1025)


def test_keys_are_asked_for_everywhere_but_of_health(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    alice = Credentials(api_key=add_key(path, "alice"))
    root = Credentials(api_key=add_key(path, "root", admin=True))

    async def check() -> None:
        async with serving(keys=KeyRing(path)) as (address, _), open_async_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=10)).status == 1
            assert (await health.Watch(health_pb2.HealthCheckRequest(), timeout=10).read()).status == 1
            for credentials in (NO_CREDENTIALS, Credentials(api_key="es-wrong")):
                with pytest.raises(Unauthenticated, match="EXPERT_SERVING_API_KEY"):
                    await ask(address, credentials)
                with pytest.raises(grpc.RpcError) as refused:
                    await streaming(address, credentials)[1].read()
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert await reflected(channel, NO_CREDENTIALS) is grpc.StatusCode.UNAUTHENTICATED
            assert await reflected(channel, alice) is None
            assert (await ask(address, alice)).model == "echo"
            with pytest.raises(PermissionDenied, match="'alice' is no admin's"):
                await ask(address, alice, "Stop")
            await ask(address, root, "Stop")
            with pytest.raises(PermissionDenied, match="GpuWorker/Stats is for them alone"):
                await ask(address, alice, "Stats")

    run(check)


async def reflected(channel: grpc.aio.Channel, credentials: Credentials) -> grpc.StatusCode | None:
    """How a question to the reflection service fails; None if it is answered."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    try:
        call = stub.ServerReflectionInfo(iter([request]), timeout=10, metadata=credentials.metadata)
        assert len((await call.read()).list_services_response.service) == 3
    except grpc.RpcError as error:
        return error.code()
    return None


def test_a_place_is_free_again_however_a_request_ends(tmp_path: Path) -> None:
    """To its end, cancelled by its client, or its connection gone."""
    path = tmp_path / "keys.toml"
    alice = Credentials(api_key=add_key(path, "alice", max_concurrent_requests=1, max_prompt_tokens=4))
    bob = Credentials(api_key=add_key(path, "bob"))

    async def check() -> None:
        ring = KeyRing(path)
        async with serving(keys=ring) as (address, echo):
            usage = ring.find(alice.metadata[0][1])
            for ending in ("cancel", "close", "end"):
                channel, call = streaming(address, alice)
                await call.read()
                assert usage.running == 1
                with pytest.raises(grpc.RpcError) as refused:
                    await streaming(address, alice)[1].read()
                assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert isinstance(translate(refused.value, address), Exhausted)
                await streaming(address, bob)[1].read()  # the others are not concerned
                await ask(address, alice)  # nor is what is no work
                if ending == "cancel":
                    call.cancel()
                elif ending == "close":
                    await channel.close()
                else:
                    echo.go_on.set()
                    while await call.read() is not grpc.aio.EOF:
                        pass
                await asyncio.wait_for(nothing_runs(usage), 10)
                await channel.close()
            with pytest.raises(grpc.RpcError) as refused:
                await streaming(address, alice, tokens=5)[1].read()
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert usage.running == 0

    run(check)


def test_a_refusal_tells_when_to_try_again_and_one_for_good_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both are in the log."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "keys.toml"
    alice = Credentials(api_key=add_key(path, "alice", requests_per_minute=2))

    async def refusal(address: Address, *more: tuple[str, str]) -> Exception:
        with pytest.raises(grpc.RpcError) as refused:
            await streaming(address, alice, 2, *more)[1].read()
        return translate(refused.value, address)

    async def check() -> None:
        async with serving(keys=KeyRing(path)) as (address, _):
            for _ in range(3):  # which does not count
                assert isinstance(await refusal(address, (TOGETHER, "3")), PermissionDenied)
            for count in ("2", "9" * 99):  # nobody means the second
                await streaming(address, alice, 2, (TOGETHER, count))[1].read()
            error = await refusal(address)
            assert isinstance(error, Exhausted) and "2 requests a minute" in str(error)
            assert error.retry_after is not None and 50 <= error.retry_after <= 60
        assert caplog.text.count("refused /expert_serving.v1.GpuWorker/Generate to ") == 4

    run(check)


@pytest.mark.parametrize("quoted", ["x", "\U0001f9a5", "\n"])
@pytest.mark.parametrize("length", [100, 9_000, 5_000_000])
def test_an_error_is_what_it_is_however_much_it_quotes(quoted: str, length: int) -> None:
    """It was RESOURCE_EXHAUSTED once, from 8 KiB on: nothing was to be changed, and it was tried again."""

    async def check() -> None:
        async with serving() as (address, echo):
            echo.error = InvalidRequest(f"there is no {quoted * length}; leave it out")
            with pytest.raises(InvalidRequest, match=r"(?s)^there is no .*; leave it out$") as told:
                await ask(address)
            assert (str(told.value) == str(echo.error)) == (length == 100)

    run(check)


@pytest.mark.parametrize(
    ("told", "seconds"),
    [("1500", 2), ("0", 0), ("-1", None), ("x", None), ("9" * 8, 86400), ("9" * 99, None)],
)
def test_what_a_server_tells_of_the_time_is_looked_at(told: str, seconds: int | None) -> None:
    class Refused(grpc.RpcError):
        def trailing_metadata(self) -> Any:
            return (("grpc-retry-pushback-ms", told),)

    assert retry_after(Refused()) == seconds


async def nothing_runs(usage: KeyUsage) -> None:
    while usage.running:
        await asyncio.sleep(0.01)


def test_python_and_grpc_agree_on_the_certificate(authority: Authority) -> None:
    """A client that is not gRPC's: plain TLS, as `openssl s_client` would make it."""
    cert, key = authority.issue("localhost")

    async def check() -> None:
        async with serving(ServerTls(cert, key, None)) as (address, _):
            context = ssl.create_default_context(cafile=str(authority.file))
            context.set_alpn_protocols(["h2"])
            port = int(str(address).rpartition(":")[2])
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=context, server_hostname="localhost"
            )
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
            assert writer.get_extra_info("ssl_object").version() in ("TLSv1.2", "TLSv1.3")
            writer.close()

    run(check)
