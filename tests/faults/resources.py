"""Disks, memory, descriptors and clocks that fail under a process that lives."""

from __future__ import annotations

import random
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from common.errors import CheckpointError, Exhausted, Unavailable
from tests.faults.case import Case
from tests.faults.deaths import EVERYBODY
from tests.faults.rig import Rig
from tests.system.processes import SCRIPTS, environment


class ReadErrors(Case):
    name = "disk read errors while staging"
    expected = "requests end CheckpointError naming the file, or are right"
    errors = (CheckpointError,)

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        rig.shim.set(read_errors=draw.choice([1, 5, 50, 100]))
        time.sleep(1.5)
        return EVERYBODY


class SlowDisk(Case):
    name = "slow disk while staging"
    expected = "every request is right, late"

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        rig.shim.set(read_delay_ms=draw.choice([100, 500, 3000]))
        time.sleep(4)
        return set()


class StuckDisk(Case):
    name = "disk that does not answer for 23 s"
    expected = "requests end Unavailable after 20 s, naming the disk; right afterwards"
    errors = (Unavailable,)

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        rig.shim.set(read_delay_ms=10_000_000)
        time.sleep(23)
        return EVERYBODY


class FullSharedMemory(Case):
    name = "/dev/shm full while the store loads"
    expected = "the frames that have memory serve; with none, Exhausted at once; right when there is room"
    errors = (Exhausted, Unavailable)  # the latter while the store restarts

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        left = draw.randrange(4)
        rig.store.stop()
        rig.shim.set(allocations_left=left)
        rig.start_store()
        if left:
            rig.recover(self.recovery)
        else:
            time.sleep(1)
        return EVERYBODY


class FullDisk(Case):
    name = "disk full while packing"
    expected = "pack exits 1 naming the cause, keeps what can be gone on from; what is served is right"

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        source = Path(rig.pair.model).with_name("hf")
        target = rig.pair.runtime / f"packed-{draw.random()}"
        limit = draw.randrange(1000, 500_000)
        done = subprocess.run(
            ["prlimit", f"--fsize={limit}", str(SCRIPTS / "expert-store"), "pack", str(source), str(target)],
            capture_output=True, text=True, env=environment(rig.pair.runtime), check=False,
        )  # fmt: skip
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert "no room on the disk" in done.stderr, done.stderr
        assert not target.exists(), "a checkpoint that is not whole"
        return set()


class NoDescriptors(Case):
    """A process that may open few files, and clients that take all the connections there are."""

    errors = (Unavailable,)

    def __init__(self, victim: str) -> None:
        self.name = f"no file descriptors left, {victim}"
        self.expected = "who cannot connect is told Unavailable; streams and workers go on; it lives"
        self._victim = victim

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        address = rig.pair.store_address if self._victim == "store" else rig.addresses[0]
        process = rig.restart_store if self._victim == "store" else partial(rig.restart_worker, 0)
        rig.pair.open_files = draw.randrange(150, 250)
        try:
            process()
        finally:
            rig.pair.open_files = None
        with rig.leases() as end_all, ExitStack() as connections:
            for _ in range(300):
                client = connections.enter_context(socket.socket(socket.AF_UNIX))
                client.settimeout(0.2)
                with suppress(OSError):
                    client.connect(str(address.socket_path))
            end_all()  # so that workers attach and connect anew, in need of descriptors
            time.sleep(draw.choice([1, 3]))
        return EVERYBODY if self._victim == "store" else {0}


class ClockJumps(Case):
    name = "wall clock jumps, all processes"
    expected = "nobody notices"

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        for _ in range(6):
            rig.shim.set(clock_offset=draw.choice([-1, 1]) * draw.choice([1, 60, 3600, 86400, 10**8]))
            time.sleep(draw.uniform(0.1, 0.8))
        return set()


CASES = [
    ReadErrors(), SlowDisk(), StuckDisk(), FullSharedMemory(), FullDisk(),
    NoDescriptors("store"), NoDescriptors("worker"), ClockJumps(),
]  # fmt: skip
