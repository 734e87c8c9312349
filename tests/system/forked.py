"""Console scripts in processes forked from one that has imported PyTorch already, which is most of a start.

Everything else is as their users have it: a process of its own with its arguments, environment, directory and
standard streams, which ends with an exit status. Tests that are about starting run the scripts themselves.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

PROGRAMS = {"expert-store": "expert_store.cli", "gpu-worker": "gpu_worker.cli"}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PRELOADED = [
    "expert_store.server",
    "gpu_worker.server",
    "gpu_worker.loading",
    "gpu_worker.gateway.server",
    *PROGRAMS.values(),
]


class ForkedProcess:
    """What the tests use of `subprocess.Popen`."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], stdout: Path, stderr: Path
    ) -> None:
        arguments = (list(command), dict(environment), Path.cwd(), stdout, stderr)
        self._process = _context().Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if (status := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run_forked(
    command: Sequence[str], environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """A command to its end, as `subprocess.run`."""
    with TemporaryDirectory() as directory:
        output, errors = Path(directory, "stdout"), Path(directory, "stderr")
        process = ForkedProcess(command, environment, output, errors)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, status, output.read_text(), errors.read_text())


@cache
def _context() -> ForkServerContext:
    """The process to fork from, started at the first call; that it has one thread makes forking safe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def _run(
    command: list[str], environment: dict[str, str], directory: Path, stdout: Path, stderr: Path
) -> None:
    # Nothing outlives tests that were killed, of which the process that this one is forked from hears.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for stream, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    sys.argv = command
    sys.exit(import_module(PROGRAMS[command[0]]).main())
