"""Both processes serving one model, as a user starts them, and the memory that they take.

A store outlives its workers: several may be started on it, one after the other, each with options of its own.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from synthetic import COMMANDS

from common.addresses import Address
from common.errors import Unavailable
from common.grpc_client import channel_to, wait_until_serving
from common.rpc import expert_store_pb2 as store_pb
from common.rpc import gpu_worker_pb2 as worker_pb
from common.rpc.expert_store_pb2_grpc import ExpertStoreStub
from gpu_worker.client import Generated, WorkerClient

_STOP_SECONDS = 40.0  # a worker may take 30 to end the step that it is in


class Ended(SystemExit):
    """A process ended instead of serving. Ends the benchmark too, unless somebody has better ideas."""


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
    store: Store
    worker_pid: int
    start_seconds: float  # from the worker's command to serving

    def generate(self, prompt: Sequence[int], new: int) -> worker_pb.Finish:
        """Exactly `new` tokens after the prompt, greedily; what the worker says of it."""
        generated = Generated()
        for event in self.client.generate(prompt, max_new_tokens=new, ignore_eos=True):
            generated.add(event)
        assert generated.finish is not None and len(generated.token_ids) == new
        return generated.finish


class Store(NamedTuple):
    """A store that serves."""

    address: Address
    pid: int
    runtime: Path

    @property
    def worker_log(self) -> Path:
        """What the last worker said."""
        return self.runtime / "gpu-worker.log"

    def stats(self) -> store_pb.StoreStats:
        with channel_to(self.address) as channel:
            return ExpertStoreStub(channel).Stats(store_pb.StoreStatsRequest(), timeout=10)

    def wait_until_full(self, timeout: float) -> None:
        """A starting store reads ahead into every frame; what is measured comes after that."""
        deadline = time.monotonic() + timeout
        while (stats := self.stats()).ready_frames < stats.frames:
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"the store has {stats.ready_frames} of {stats.frames} frames ready, no more"
                )
            time.sleep(0.2)

    @contextmanager
    def worker(self, options: Sequence[str], timeout: float) -> Iterator[Pair]:
        """Start a worker and wait until it serves; stop it at the end of the block. One at a time."""
        started = time.monotonic()
        with _process(["gpu-worker", "start", *options], self.runtime, "worker", timeout) as (address, pid):
            seconds = time.monotonic() - started
            with WorkerClient(address) as client:
                yield Pair(client, self, pid, seconds)


def prompt_of(seed: int, tokens: int, vocabulary: int) -> list[int]:
    """Token ids that differ from seed to seed and do not repeat soon."""
    return [(seed * 7919 + 31 * i * i) % vocabulary for i in range(tokens)]


@contextmanager
def store_of(model: Path | str, runtime: Path, options: Sequence[str], timeout: float) -> Iterator[Store]:
    """Start a store with its socket in `runtime`, and wait until it serves; stop it at the end of the block.

    Raises Ended if it ends instead, Unavailable after `timeout` seconds. So does `Store.worker`.
    """
    with _process(["expert-store", "start", str(model), *options], runtime, "store", timeout) as served:
        yield Store(*served, runtime)


@contextmanager
def served(
    model: Path,
    runtime: Path,
    store_options: Sequence[str] = (),
    worker_options: Sequence[str] = (),
    timeout: float = 120,
) -> Iterator[Pair]:
    """A store and one worker on the CPU, with their sockets in `runtime`."""
    with (
        store_of(model, runtime, store_options, timeout) as store,
        store.worker(["--device", "cpu", *worker_options], timeout) as pair,
    ):
        yield pair


@contextmanager
def _process(command: list[str], runtime: Path, socket: str, timeout: float) -> Iterator[tuple[Address, int]]:
    """One of both, serving on its default address below `runtime`, beside which its log lies."""
    address, log = Address.parse(f"unix:{runtime}/{socket}.sock"), runtime / f"{command[0]}.log"
    environment = os.environ | {"EXPERT_SERVING_RUNTIME_DIR": str(runtime)}
    with log.open("wb") as stderr:
        process = subprocess.Popen([str(COMMANDS / command[0]), *command[1:]], env=environment, stderr=stderr)
    try:
        _wait(address, process, log, timeout)
        yield address, process.pid
    finally:
        stop(process)


def _wait(address: Address, process: subprocess.Popen[bytes], log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return wait_until_serving(address, 0.5)
        except Unavailable:
            if process.poll() is not None:
                raise Ended(f"{log.stem} ended:\n{log.read_text()}") from None
            if time.monotonic() > deadline:
                raise


def stop(process: subprocess.Popen[Any]) -> None:
    """In good order; at once if that takes too long."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
