"""Processes for a soak: the demo model on the CPU, and little of everything to share."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.addresses import Address
from tests.system.processes import READY, Pair, Process, eventually, pair_of_processes

_STORE = ("--ram", "3MB")  # for half of the experts
_WORKER = ("--slots", "12", "--max-sequences", "8", "--max-queue", "48", "--prefix-cache", "32MB")


@contextmanager
def soak_pair(runtime: Path) -> Iterator[tuple[Address, Address, str]]:
    """Addresses of worker, store and gateway; nothing may be left of them in the end."""
    with pair_of_processes(runtime, "demo") as pair:
        pair.start_store(*_STORE)
        pair.start_worker(*_WORKER)
        yield pair.worker_address, pair.store_address, gateway_of(pair)
    assert pair.leftovers() == []


def gateway_of(pair: Pair) -> str:
    """The URL of a gateway that ends with the pair."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    pair.processes.append(Process(pair.runtime, "gpu-worker", "gateway", "--listen", listen, forked=True))
    eventually(lambda: _healthy(listen), READY, "the gateway's readiness")
    return f"http://{listen}"


def _healthy(listen: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{listen}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except urllib.error.URLError:
        return False
