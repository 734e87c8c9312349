"""Real processes for tests: awaited by their health service, not by sleep.

Each pair lives in a runtime directory of its own, so nothing is shared between tests but the machine. Stores
and workers of a pair, and the commands it runs, are forked (see `forked`); a `Process` of a test's own is a
console script from its first line.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.addresses import Address
from common.arena import SEGMENT_DIRECTORY
from common.errors import Unavailable
from common.grpc_client import channel_to, wait_until_serving
from common.rpc import expert_store_pb2 as store_pb2
from common.rpc import gpu_worker_pb2 as worker_pb2
from common.rpc.expert_store_pb2_grpc import ExpertStoreStub
from gpu_worker.client import Generated, WorkerClient
from tests.system.forked import PROGRAMS, ForkedProcess, run_forked

SCRIPTS = Path(sys.executable).parent
READY = 60.0  # seconds; generous, since the machine may be busy


def environment(runtime: Path) -> dict[str, str]:
    """One thread a process: several processes share few cores here, and threads would wait for each other."""
    return os.environ | {"EXPERT_SERVING_RUNTIME_DIR": str(runtime), "OMP_NUM_THREADS": "1"}


class Process:
    """One process in the background, its stderr kept for the failure report."""

    def __init__(
        self, runtime: Path, *command: str, forked: bool = False, more: dict[str, str] | None = None
    ) -> None:
        """`more`: of the environment of one that is not forked."""
        self.log = runtime / f"{Path(command[0]).name}-{time.monotonic_ns()}.log"
        self.popen: subprocess.Popen[bytes] | ForkedProcess
        if forked:
            self.popen = ForkedProcess(command, environment(runtime), self.log, self.log)
            return
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                [str(SCRIPTS / command[0]), *command[1:]],
                stderr=log,
                stdout=log,
                env=environment(runtime) | (more or {}),
            )

    def wait_ready(self, address: Address) -> None:
        try:
            wait_until_serving(address, READY)
        except Unavailable as error:
            raise AssertionError(f"{error}\n{self.log.read_text()}") from None

    def kill(self) -> None:
        """kill -9."""
        self.popen.kill()
        self.popen.wait(READY)

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(READY)


class Pair:
    """A store and a worker; either can be killed and started again."""

    def __init__(self, runtime: Path, model: Path | str) -> None:
        self.runtime, self.model = runtime, str(model)
        self.store_address = Address.parse(f"unix:{runtime}/store.sock")
        self.worker_address = Address.parse(f"unix:{runtime}/worker.sock")
        self.processes: list[Process] = []
        # Of what is started from now on; given either, it is a console script and not forked.
        self.environment: dict[str, str] = {}
        self.open_files: int | None = None

    def start_store(self, *options: str) -> Process:
        self.store = self._start(self.store_address, "expert-store", "start", self.model, *options)
        return self.store

    def start_worker(self, *options: str) -> Process:
        self.worker = self._start(self.worker_address, "gpu-worker", "start", "--device", "cpu", *options)
        return self.worker

    def generate(self, tokens: Sequence[int], count: int, **sampling: Any) -> Generated:
        """Once: what becomes of it, tests want to see."""
        result = Generated()
        with WorkerClient(self.worker_address, retry_for=0) as client:
            for event in client.generate(list(tokens), max_new_tokens=count, ignore_eos=True, **sampling):
                result.add(event)
        return result

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of the user's, to its end."""
        done = run_forked(command, environment(self.runtime), READY)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done

    def store_stats(self) -> store_pb2.StoreStats:
        with channel_to(self.store_address) as channel:
            return ExpertStoreStub(channel).Stats(store_pb2.StoreStatsRequest(), timeout=READY)

    def worker_stats(self) -> worker_pb2.WorkerStats:
        with WorkerClient(self.worker_address) as client:
            return client.stats()

    def leftovers(self) -> list[Path]:
        """Sockets, locks and shared memory of any process this pair has had."""
        files = [path for path in self.runtime.iterdir() if path.suffix != ".log"]
        for process in self.processes:
            pattern = f"expert-serving-{os.getuid()}-{process.popen.pid}-*"
            files += SEGMENT_DIRECTORY.glob(pattern)
        return files

    def _start(self, address: Address, *command: str) -> Process:
        if self.open_files is not None:
            limit = f"--nofile={self.open_files}:{self.open_files}"
            command = ("/usr/bin/prlimit", limit, str(SCRIPTS / command[0]), *command[1:])
        forked = command[0] in PROGRAMS and not self.environment
        process = Process(self.runtime, *command, forked=forked, more=self.environment)
        self.processes.append(process)
        process.wait_ready(address)
        return process


@contextmanager
def pair_of_processes(runtime: Path, model: Path | str) -> Iterator[Pair]:
    """A pair with nothing started yet; whatever was started is stopped at the end, whatever happens."""
    runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    runtime.chmod(0o700)
    pair = Pair(runtime, model)
    try:
        yield pair
    finally:
        for process in reversed(pair.processes):
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGCONT)
                process.stop()


def eventually(condition: Callable[[], bool], within: float, what: str) -> float:
    """Poll until `condition()`; returns the seconds it took, fails naming `what` after `within`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within, f"{what} did not happen within {within:g} s"
        time.sleep(0.02)
    return time.monotonic() - started


def free_port() -> int:
    """Of loopback. Whoever takes it next, it is not in use now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
