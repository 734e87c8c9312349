"""Running out of file descriptors: clients never take the last, and a call that lacks one fails alone.

Real processes that have run out of them are in `tests/faults`.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
from pathlib import Path

import grpc
import pytest

from common import grpc_server
from common.addresses import Address
from common.errors import ConfigError
from common.grpc_client import open_async_channel
from common.grpc_server import RpcServer
from common.process import connections_allowed
from common.rpc import expert_store_pb2 as pb
from common.rpc.expert_store_pb2_grpc import (
    ExpertStoreServicer,
    ExpertStoreStub,
    add_ExpertStoreServicer_to_server,
)


class Service(ExpertStoreServicer):
    """Stats answers; Stop would have to open a file."""

    async def Stats(self, request: pb.StoreStatsRequest, context: object) -> pb.StoreStats:
        return pb.StoreStats(model="here")

    async def Stop(self, request: pb.StopStoreRequest, context: object) -> pb.StopStoreReply:
        raise OSError(errno.EMFILE, "Too many open files")


def test_clients_that_are_too_many_are_refused_and_a_call_without_a_descriptor_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "connections_allowed", lambda: 4)
    fatal: list[BaseException] = []

    async def run() -> None:
        server = RpcServer(Address.parse(f"unix:{tmp_path}/socket"), on_fatal=fatal.append)
        add_ExpertStoreServicer_to_server(Service(), server.server)
        await server.start("expert_serving.v1.ExpertStore")
        async with open_async_channel(server.address) as channel:
            store = ExpertStoreStub(channel)
            await store.Stats(pb.StoreStatsRequest(), timeout=10)
            clients = [socket.socket(socket.AF_UNIX) for _ in range(8)]
            for client in clients:
                client.settimeout(5)
                await asyncio.to_thread(client.connect, str(tmp_path / "socket"))
            # The first thing a server of HTTP/2 says, or nothing.
            greeted = [bool(await asyncio.to_thread(greeting, client)) for client in clients]
            assert sum(greeted) == 3
            with pytest.raises(grpc.RpcError) as failed:
                await store.Stop(pb.StopStoreRequest(), timeout=10)
            assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "Too many open files" in failed.value.details()
            assert (await store.Stats(pb.StoreStatsRequest(), timeout=10)).model
            for client in clients:
                client.close()
        await server.stop(0)

    asyncio.run(run())
    assert not fatal


def greeting(client: socket.socket) -> bytes:
    try:
        return client.recv(9)
    except OSError:
        return b""


def test_descriptors_are_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (opened + 100, opened + 100))
    assert 16 <= connections_allowed() <= 50
    monkeypatch.setattr(resource, "getrlimit", lambda which: (32, 32))
    with pytest.raises(ConfigError, match="limit of open files, 32"):
        connections_allowed()
