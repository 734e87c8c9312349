"""What the gateway adds to a token: the time from the worker to the client, through it and without it.

The worker is one that has no model (`paced_worker.py`): a real one's steps take up to a hundred times longer
than what is measured here, and differ by more.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import Figure
from pair import stop
from synthetic import COMMANDS

from common.addresses import Address
from common.grpc_client import wait_until_serving
from gpu_worker.client import WorkerClient

TOKENS, ROUNDS = 400, 9
PACES = {1: 4_000, 8: 16_000}  # clients, and microseconds between two tokens of each
_GOAL = 1.0  # milliseconds a token
_TIMEOUT = 60.0

Ask = Callable[
    [int], Sequence[float]
]  # microseconds between tokens, to the milliseconds that each was on its way


def benchmark() -> Iterator[Figure]:
    """Milliseconds a token."""
    with TemporaryDirectory() as directory:
        runtime = Path(directory)
        with _worker(runtime) as address, _gateway(runtime) as (port, pid), WorkerClient(address) as client:
            for clients, pace in PACES.items():
                yield from _compared(clients, pace, lambda pause: _direct(client, pause), port, pid)


def _compared(clients: int, pace: int, direct: Ask, port: int, pid: int) -> Iterator[Figure]:
    added, late, worked = [], [], []
    for _ in range(ROUNDS + 1):
        without = _together(direct, clients, pace)
        cpu = _cpu_seconds(pid)
        through = _together(lambda pause: _through(port, pause), clients, pace)
        worked.append((_cpu_seconds(pid) - cpu) * 1e3 / len(through))
        added.append(statistics.median(through) - statistics.median(without))
        late.append(_percentile(through) - _percentile(without))
    who = "one client" if clients == 1 else f"{clients} clients"
    yield _figure(f"gateway, {who}: added to a token's time", added[1:], _GOAL)
    yield _figure(f"gateway, {who}: added to the 99th percentile", late[1:], None)
    yield _figure(f"gateway, {who}: its processor time a token", worked[1:], None)


def _figure(what: str, values: Sequence[float], at_most: float | None) -> Figure:
    low, high = min(values), max(values)
    return Figure(what, statistics.median(values), "ms", at_most=at_most, lowest=low, highest=high)


def _percentile(times: Sequence[float]) -> float:
    return statistics.quantiles(times, n=100)[-1]


def _together(ask: Ask, clients: int, pace: int) -> list[float]:
    with ThreadPoolExecutor(clients) as pool:
        return [taken for times in pool.map(ask, [pace] * clients) for taken in times]


def _direct(client: WorkerClient, pause: int) -> list[float]:
    times = []
    for event in client.generate("x", max_new_tokens=TOKENS, top_k=pause):
        if event.delta.text:
            times.append((time.monotonic_ns() - int(event.delta.text)) / 1e6)
    return times


def _through(port: int, pause: int) -> list[float]:
    body = {"prompt": "x", "max_tokens": TOKENS, "top_k": pause, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    times = []
    for line in connection.getresponse():
        now = time.monotonic_ns()
        if line.startswith(b"data: {") and (text := json.loads(line[6:])["choices"][0]["text"]):
            times.append((now - int(text)) / 1e6)
    connection.close()
    assert len(times) == TOKENS, len(times)
    return times


@contextmanager
def _worker(runtime: Path) -> Iterator[Address]:
    address = Address.parse(f"unix:{runtime}/worker.sock")
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("paced_worker.py")), str(address)]
    )
    try:
        wait_until_serving(address, _TIMEOUT)
        yield address
    finally:
        stop(process)


@contextmanager
def _gateway(runtime: Path) -> Iterator[tuple[int, int]]:
    """Its port and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(COMMANDS / "gpu-worker"), "gateway", "--listen", f"127.0.0.1:{port}"]
    environment = os.environ | {"EXPERT_SERVING_RUNTIME_DIR": str(runtime)}
    process = subprocess.Popen([*command, "--log-level", "warning"], env=environment)
    try:
        deadline = time.monotonic() + _TIMEOUT
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the gateway did not start")
            time.sleep(0.05)
        yield port, process.pid
    finally:
        stop(process)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _cpu_seconds(pid: int) -> float:
    """Of a process, by the system's count."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
