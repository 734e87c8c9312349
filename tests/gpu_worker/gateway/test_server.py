"""The gateway's life: sockets, certificates, stopping; and its options."""

from __future__ import annotations

import http.client
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from common.addresses import Address
from common.errors import ConfigError
from gpu_worker.gateway.config import GatewayConfig
from gpu_worker.gateway.server import GatewayServer
from tests.helpers.gateways import WAIT, LoopThread

NOWHERE = Address.parse("unix:/nonexistent/worker.sock")


@contextmanager
def running(loop: LoopThread, **options: Any) -> Iterator[tuple[GatewayServer, Future[int]]]:
    async def make() -> GatewayServer:
        return GatewayServer(GatewayConfig(worker=NOWHERE, **options))

    async def stop() -> None:
        server.stop()

    server = loop.run(make())
    ended = loop.start(server.run())
    try:
        yield server, ended
    finally:
        loop.run(stop())
        assert ended.result(WAIT) == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def status_of(connection: http.client.HTTPConnection) -> int:
    """Of /health, once somebody listens."""
    deadline = time.monotonic() + WAIT
    while True:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except (ConnectionRefusedError, FileNotFoundError):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        finally:
            connection.close()


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=WAIT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            self.sock.connect(str(self._path))
        except OSError:
            self.sock.close()
            raise


def test_a_unix_socket_is_its_owners(loop: LoopThread, tmp_path: Path) -> None:
    path = tmp_path / "g.sock"
    with running(loop, listen=Address.parse(f"unix:{path}")):
        assert status_of(UnixConnection(path)) == 503  # there is no worker
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_tls(loop: LoopThread, tmp_path: Path) -> None:
    """Also that a renewed certificate is taken up, and that one of ours is asked for if that was said."""
    authority, clients = trustme.CA(), trustme.CA()
    cert, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    clients.cert_pem.write_to_path(str(ca))

    def issue() -> bytes:
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(str(key))
        cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())

    def shown(context: ssl.SSLContext) -> bytes | None:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=WAIT) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
        ):
            return tls.getpeercert(binary_form=True)

    context = ssl.create_default_context()
    authority.configure_trust(context)
    clients.issue_cert("client@example.org").configure_cert(context)
    port, first = free_port(), issue()
    tls = {"tls_cert": cert, "tls_key": key, "tls_client_ca": ca}
    with running(loop, listen=Address.parse(f"127.0.0.1:{port}"), **tls) as (server, _):
        assert status_of(http.client.HTTPSConnection("127.0.0.1", port, timeout=WAIT, context=context)) == 503
        assert shown(context) == first
        second = issue()
        loop.run(reloaded(server))
        assert shown(context) == second
        stranger = ssl.create_default_context()
        authority.configure_trust(stranger)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            status_of(http.client.HTTPSConnection("127.0.0.1", port, timeout=WAIT, context=stranger))


async def reloaded(server: GatewayServer) -> None:
    server.reload()


def test_an_address_in_use(loop: LoopThread, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address.parse(f"127.0.0.1:{taken.getsockname()[1]}")
        with (
            pytest.raises(ConfigError, match=f"cannot listen on {address}"),
            running(loop, listen=address) as (_, ended),
        ):
            ended.result(WAIT)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"listen": Address.parse("0.0.0.0:8000")}, "--tls-cert and --tls-key, and --api-keys"),
        ({"request_timeout": 0.0}, "--request-timeout"),
        ({"request_timeout": float("nan")}, "--request-timeout"),
        ({"drain_timeout": -1.0}, "--drain-timeout"),
        ({"log_level": "LOUD"}, "--log-level"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_are_refused(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        GatewayConfig(worker=NOWHERE, **options)


def test_it_starts_without_pytorch() -> None:
    code = (
        "import gpu_worker.gateway.server, sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
