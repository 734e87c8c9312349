"""Both processes serving one model on the CPU, as a user starts them, and the memory that they take."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from synthetic import COMMANDS

from common.addresses import Address
from common.errors import Unavailable
from common.grpc_client import channel_to, wait_until_serving
from common.rpc import expert_store_pb2 as store_pb
from common.rpc import gpu_worker_pb2 as worker_pb
from common.rpc.expert_store_pb2_grpc import ExpertStoreStub
from gpu_worker.client import Generated, WorkerClient


class Resident(NamedTuple):
    """Resident bytes of a process by kind, from /proc."""

    anonymous: int
    file: int  # pages of mapped files, of libraries as well, whoever else maps them
    shared: int  # the arena's frames, as far as the process has touched them
    proportional: int  # PSS: pages that several processes map are counted in parts

    @classmethod
    def of(cls, pid: int) -> Resident:
        status = Path(f"/proc/{pid}/status").read_text() + Path(f"/proc/{pid}/smaps_rollup").read_text()
        fields = {line.split()[0]: line.split()[1:] for line in status.splitlines() if line.endswith(" kB")}
        return cls(*(int(fields[f"{name}:"][0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem", "Pss")))

    @property
    def own(self) -> int:
        """Everything but shared memory."""
        return self.anonymous + self.file


class Pair(NamedTuple):
    """Both processes, running."""

    client: WorkerClient
    store_address: Address
    store_pid: int
    worker_pid: int

    def generate(self, prompt: Sequence[int], new: int) -> worker_pb.Finish:
        """Exactly `new` tokens after the prompt, greedily; what the worker says of it."""
        generated = Generated()
        for event in self.client.generate(prompt, max_new_tokens=new, ignore_eos=True):
            generated.add(event)
        assert generated.finish is not None and len(generated.token_ids) == new
        return generated.finish

    def store_stats(self) -> store_pb.StoreStats:
        with channel_to(self.store_address) as channel:
            return ExpertStoreStub(channel).Stats(store_pb.StoreStatsRequest(), timeout=10)


def prompt_of(seed: int, tokens: int, vocabulary: int) -> list[int]:
    """Token ids that differ from seed to seed and do not repeat soon."""
    return [(seed * 7919 + 31 * i * i) % vocabulary for i in range(tokens)]


@contextmanager
def served(
    model: Path,
    runtime: Path,
    store_options: Sequence[str] = (),
    worker_options: Sequence[str] = (),
    timeout: float = 120,
) -> Iterator[Pair]:
    """Start a store and a worker with their sockets in `runtime`; stop both at the end of the block."""
    environment = os.environ | {"EXPERT_SERVING_RUNTIME_DIR": str(runtime)}
    store = _start(["expert-store", "start", str(model), *store_options], environment, runtime)
    worker = _start(["gpu-worker", "start", "--device", "cpu", *worker_options], environment, runtime)
    addresses = [Address.parse(f"unix:{runtime}/{name}.sock") for name in ("store", "worker")]
    try:
        _wait(addresses[1], {"expert-store": store, "gpu-worker": worker}, runtime, timeout)
        with WorkerClient(addresses[1]) as client:
            yield Pair(client, addresses[0], store.pid, worker.pid)
    finally:
        for process in (worker, store):
            process.terminate()
            process.wait(30)


def _start(command: list[str], environment: dict[str, str], runtime: Path) -> subprocess.Popen[bytes]:
    with (runtime / f"{command[0]}.log").open("wb") as log:
        return subprocess.Popen([str(COMMANDS / command[0]), *command[1:]], env=environment, stderr=log)


def _wait(
    address: Address, processes: dict[str, subprocess.Popen[bytes]], runtime: Path, timeout: float
) -> None:
    """Until it serves; ends the benchmark with what a process said that has ended instead."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return wait_until_serving(address, 1)
        except Unavailable:
            for name, process in processes.items():
                if process.poll() is not None:
                    raise SystemExit(f"{name} ended:\n{(runtime / f'{name}.log').read_text()}") from None
            if time.monotonic() > deadline:
                raise
