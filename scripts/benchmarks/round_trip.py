"""The data plane's round trip: STAGE for a READY frame in a real store, against a bare pyzmq echo."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import zmq
from measure import Comparison, comparison

from common.addresses import Address
from common.expert_key import ExpertKey
from common.grpc_client import channel_to, wait_until_serving
from common.messages import PROTOCOL_VERSION, Kind, Staged, request, unpack_reply
from common.rpc import expert_store_pb2 as pb
from common.rpc.expert_store_pb2_grpc import ExpertStoreStub

_TRIPS, _PAIRS = 500, 21


def benchmark() -> Iterator[Comparison]:
    """Medians of single trips, in blocks of the two kinds in turn."""
    with TemporaryDirectory() as directory:
        runtime = Path(directory)
        runtime.chmod(0o700)
        echo = multiprocessing.get_context("spawn").Process(target=_echo, args=(f"ipc://{runtime}/echo",))
        environment = os.environ | {"EXPERT_SERVING_RUNTIME_DIR": directory}
        command = [str(Path(sys.executable).with_name("expert-store")), "start", "demo"]
        store = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        echo.start()
        try:
            yield _compare(Address.parse(f"unix:{runtime}/store.sock"), f"ipc://{runtime}/echo")
        finally:
            store.terminate()
            store.wait()
            echo.kill()


def _compare(address: Address, echo_endpoint: str) -> Comparison:
    wait_until_serving(address, 120)
    with channel_to(address) as channel, zmq.Context() as context:
        stub = ExpertStoreStub(channel)
        attach = pb.AttachRequest(protocol_version=PROTOCOL_VERSION, worker="benchmark", pid=os.getpid())
        attached = stub.Attach(attach)
        with context.socket(zmq.DEALER) as store, context.socket(zmq.DEALER) as echo:
            store.connect(attached.data_endpoint)
            echo.connect(echo_endpoint)
            message = request(Kind.STAGE, 1, attached.lease_id, [ExpertKey(0, 0)])

            def stage() -> None:
                store.send(message)
                assert isinstance(unpack_reply(store.recv()), Staged)

            def bounce() -> None:
                echo.send(message)
                echo.recv()

            ours, theirs = [], []
            for _ in range(_PAIRS + 1):
                stub.Heartbeat(pb.HeartbeatRequest(lease_id=attached.lease_id))
                ours.append(_median_trip(stage))
                theirs.append(_median_trip(bounce))
    names = ("STAGE, frame READY", "bare pyzmq echo, two processes")
    goal = 1 / 1.5  # at most one and a half times as long
    return comparison("STAGE round trip", *names, ours[1:], theirs[1:], 1.0, "trips/s", goal)


def _median_trip(trip: Callable[[], None]) -> float:
    times = []
    for _ in range(_TRIPS):
        started = time.perf_counter()
        trip()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _echo(endpoint: str) -> None:
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(endpoint)
    while True:
        socket.send_multipart(socket.recv_multipart())
