"""What SIGHUP means to a process: read the configuration again, or, where a terminal has gone, stop.

And what the garbage collector is spared.
"""

from __future__ import annotations

import gc
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.process import importing

PROGRAM = """
import asyncio, logging, os, signal, sys
from functools import partial
from pathlib import Path
from common.errors import ConfigError
from common.options import resolve
from common.process import configure_process, run_service
from common.process_config import ProcessConfig

file, terminal, stays = Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["stays"]

class Service:
    def __init__(self):
        self.ended = asyncio.Event()

    async def run(self):
        print("up", flush=True)
        await self.ended.wait()
        return 0

    def stop(self):
        if stays:
            print("stopping", flush=True)
        else:
            self.ended.set()

    def reload(self):
        print("reload at", logging.getLevelName(logging.getLogger().level), flush=True)

if terminal:
    os.open(terminal, os.O_RDWR)  # a session's leader gets its terminal by opening one
configure_process("INFO", "text")
sys.exit(run_service(Service, partial(resolve, ProcessConfig, {}, file)))
"""


class Running:
    """The program in a session of its own, up."""

    def __init__(self, file: Path, terminal: str = "", *before: str, stays: bool = False) -> None:
        """`stays`: it takes its time to stop."""
        command = [*before, sys.executable, "-c", PROGRAM, str(file), terminal, *["stays"] * stays]
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.expect("up")

    def expect(self, text: str) -> None:
        """Read on to the next line that has it."""
        assert self.popen.stdout is not None
        seen = []
        for line in self.popen.stdout:
            if text in line:
                return
            seen.append(line)
        raise AssertionError(f"no {text!r} in {seen}")

    def hang_up(self) -> None:
        self.popen.send_signal(signal.SIGHUP)

    def end(self) -> int:
        self.popen.terminate()
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        return self.popen.wait(20)


@pytest.fixture(autouse=True)
def nothing_is_ignored() -> Iterator[None]:
    """A child ignores what its parent does, and tests may themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "process.toml"
    path.write_text('log-level = "info"\n')
    return path


def test_sighup_reads_the_configuration_again(file: Path) -> None:
    running = Running(file)
    file.write_text('log-level = "debug"\n')
    running.hang_up()
    running.expect("reload at INFO")
    running.expect("reloaded")
    file.write_text('log-levle = "error"\n')
    running.hang_up()
    running.expect("reload at DEBUG")  # whatever is wrong with the rest
    running.expect("reloading failed, what could not be read stays as it was: ")
    file.write_text('log-level = "error"\n')
    running.hang_up()
    running.expect("reload at DEBUG")
    assert running.end() == 0


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_to_stop_of_either_kind_ends_at_once(
    file: Path, first: signal.Signals, second: signal.Signals
) -> None:
    running = Running(file, stays=True)
    running.popen.send_signal(first)
    running.expect("stopping")
    running.popen.send_signal(second)
    try:
        assert running.popen.wait(20) != 0
    finally:
        running.popen.kill()
        running.end()


@pytest.mark.parametrize("before", [(), ("nohup",)])
def test_a_terminal_that_goes_away_stops_what_ran_in_it_unless_told_otherwise(
    file: Path, before: tuple[str, ...]
) -> None:
    ours, theirs = pty.openpty()
    running = Running(file, os.ttyname(theirs), *before)
    running.hang_up()  # the terminal is there
    running.expect("reload at INFO")
    os.close(theirs)
    os.close(ours)  # the kernel sends SIGHUP
    if before:
        running.expect("reload at INFO")
        assert running.end() == 0
    else:
        assert running.popen.wait(20) == 0
        running.end()


def test_what_was_imported_is_left_alone_by_the_collector() -> None:
    frozen = gc.get_freeze_count()
    try:
        with importing():
            assert not gc.isenabled()
            kept = [[] for _ in range(1000)]
        assert gc.isenabled() and gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.unfreeze()
