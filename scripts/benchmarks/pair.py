"""Both processes serving one model on the CPU, as a user starts them, and a client to the worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.addresses import Address
from common.grpc_client import wait_until_serving
from gpu_worker.client import WorkerClient

SCRIPTS = Path(sys.executable).parent


@contextmanager
def served(model: Path, runtime: Path) -> Iterator[tuple[WorkerClient, list[subprocess.Popen[bytes]]]]:
    """Start a store and a worker with their sockets in `runtime`; stop both at the end of the block."""
    environment = os.environ | {"EXPERT_SERVING_RUNTIME_DIR": str(runtime)}
    commands = (["expert-store", "start", str(model)], ["gpu-worker", "start", "--device", "cpu"])
    processes = [
        subprocess.Popen(
            [str(SCRIPTS / command[0]), *command[1:]], env=environment, stderr=subprocess.DEVNULL
        )
        for command in commands
    ]
    try:
        address = Address.parse(f"unix:{runtime}/worker.sock")
        wait_until_serving(address, 120)
        with WorkerClient(address) as client:
            yield client, processes
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)
