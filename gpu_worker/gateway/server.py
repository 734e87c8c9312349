"""The gateway's process: its life from listening to the end of the last request, in one place.

listen -> serve -> drain: refuse what is new, finish what is there, within --drain-timeout -> close.
(The address is claimed before and released after, by the command line.)
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from common.addresses import Address
from common.errors import ConfigError
from common.process import EXIT_INVARIANT
from common.tls import check_pair
from gpu_worker.client import AsyncWorkerClient
from gpu_worker.gateway.app import make_app
from gpu_worker.gateway.config import GatewayConfig
from gpu_worker.gateway.gateway import Gateway

log = logging.getLogger(__name__)

_BACKLOG = 512  # connections that wait to be accepted
_CLOSE_TIMEOUT = 5  # seconds, for clients to take the last of what was sent


class GatewayServer:
    """A `common.process.Service`."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._keys = config.keys()
        self._tls = _tls_context(config)
        self._stopping = asyncio.Event()
        self._exit_status = 0

    def stop(self) -> None:
        self._stopping.set()

    def reload(self) -> None:
        """Take up changed files of API keys and of the certificate; `--tls-client-ca` is read once."""
        if self._keys is not None:
            self._keys.reload()
            log.info("%d API keys", len(self._keys))
        if self._tls is not None:
            _load_certificate(self._tls, self._config)  # for connections from now on

    def fail(self, error: BaseException) -> None:
        self._exit_status = EXIT_INVARIANT
        self.stop()

    async def run(self) -> int:
        """Serve until stopped; returns the exit status."""
        config = self._config
        # Its clients try again, if they want to: the gateway says at once that the worker is not there.
        async with AsyncWorkerClient(config.worker, retry_for=0) as client:
            gateway = Gateway(client, config.model_name, config.request_timeout, self._keys)
            with listening_socket(config.listen) as listening:
                log.info("listening on %s, for the worker on %s", config.listen, config.worker)
                await self._serve(gateway, listening)
        return self._exit_status

    async def _serve(self, gateway: Gateway, listening: socket.socket) -> None:
        app = make_app(gateway)
        server = HttpServer(app, self._tls)
        serving = asyncio.create_task(server.serve([listening]))
        # In a thread and now: made when first asked for, it would hold up everybody's streams.
        schema = asyncio.create_task(asyncio.to_thread(app.openapi))
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        log.info("draining")
        if not await gateway.drain(self._config.drain_timeout):
            log.warning("some requests did not finish within %g s", self._config.drain_timeout)
        server.should_exit = True
        await asyncio.gather(serving, schema)


class HttpServer(uvicorn.Server):
    """Uvicorn's, within a process that handles signals and logs by itself."""

    def __init__(self, app: FastAPI, tls: ssl.SSLContext | None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",  # bounds the size of headers, which the faster one does not
                ws="none",
                lifespan="off",
                log_config=None,
                log_level=logging.ERROR,  # what is no HTTP is not worth a line
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=_CLOSE_TIMEOUT,
                ssl_context_factory=None if tls is None else lambda *_: tls,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def listening_socket(address: Address) -> Iterator[socket.socket]:
    """Bound by us and not by uvicorn, which would let everybody on the machine use a unix socket."""
    try:
        listening = _bound(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from None
    with listening:
        yield listening


def _bound(address: Address) -> socket.socket:
    if (path := address.socket_path) is not None:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(str(path))
        path.chmod(0o600)  # before anybody can connect: it does not listen yet
        return listening
    host, _, port = address.target.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, int(port)), family=family, backlog=_BACKLOG)


def _tls_context(config: GatewayConfig) -> ssl.SSLContext | None:
    """Raises ConfigError naming what is wrong with the files."""
    if config.tls() is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=config.tls_client_ca)
    if config.tls_client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    _load_certificate(context, config)
    return context


def _load_certificate(context: ssl.SSLContext, config: GatewayConfig) -> None:
    assert config.tls_cert is not None and config.tls_key is not None
    check_pair(config.tls_cert, config.tls_key)
    context.load_cert_chain(config.tls_cert, config.tls_key)
