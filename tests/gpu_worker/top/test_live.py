"""The live view in a terminal: it shows a worker, says when that is gone, and gives the terminal back."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from typer.testing import CliRunner

from common.errors import ConfigError
from gpu_worker.cli import app
from tests.helpers.workers import QuietLink, local_worker
from tests.system.processes import SCRIPTS

WAIT = 60.0  # seconds; far more than it takes
_SEQUENCE = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A program in a terminal of 80 columns, and all that it has written there."""

    def __init__(self, *command: str) -> None:
        self.master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "30"}
        self.popen = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        os.set_blocking(self.master, False)
        self.written = b""

    def expect(self, text: str) -> None:
        """Until it is shown, from what is shown next on."""
        deadline, start = time.monotonic() + WAIT, len(self.written)
        while text.encode() not in _SEQUENCE.sub(b"", self.written[start:]):
            assert time.monotonic() < deadline, f"{text!r} is not in {self.written[start:]!r}"
            time.sleep(0.02)
            self.read()

    def read(self) -> None:
        with suppress(OSError):  # nothing now, or nothing ever again
            self.written += os.read(self.master, 1 << 20)

    def interrupt(self) -> int:
        """Ctrl-C, and the exit status."""
        self.popen.send_signal(signal.SIGINT)
        status = self.popen.wait(WAIT)
        self.read()
        os.close(self.master)
        return status


def test_it_outlives_the_worker_and_leaves_the_terminal_as_it_was(
    quiet_link: QuietLink, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        with local_worker(quiet_link, tmp_path) as worker:
            command = (str(SCRIPTS / "gpu-worker"), "top", "--interval", "0.2")
            terminal = Terminal(*command, "--worker", str(worker.address))
            stack.callback(terminal.popen.kill)  # it would outlive a test that fails, too
            terminal.expect("cpu, float32, direct")
            terminal.expect("no request is in progress")
        terminal.expect("nothing answers")
        assert terminal.interrupt() == 0
    assert terminal.written.count(b"\x1b[?1049h") == terminal.written.count(b"\x1b[?1049l") == 1


def test_without_a_terminal_it_names_the_way_to_one_frame() -> None:
    result = CliRunner().invoke(app, ["top"])
    assert isinstance(result.exception, ConfigError) and "--once prints one frame" in str(result.exception)
