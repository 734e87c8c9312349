"""The machine under the benchmarks: what it is, how fast it reads memory, and its page cache.

Read once for the JSON line and for goals that hold only where the processor has certain instructions.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from common.hlwq import native

ROOT = Path(__file__).parents[2]


def describe() -> dict[str, Any]:
    """What figures depend on: processor, kernels, versions, and the commit where there is one."""
    return {
        "cpu": _cpuinfo().get("model name", platform.machine()),
        "cores": cores(),
        "kernels": native.path(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": _commit(),
    }


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def instructions() -> frozenset[str]:
    """Names of the processor's instruction sets, in the words of /proc/cpuinfo."""
    return frozenset(_cpuinfo().get("flags", "").split())


def use_threads(threads: int) -> None:
    """For the native kernels and for PyTorch alike."""
    native.set_threads(threads)
    torch.set_num_threads(threads)


class Memory:
    """More bytes than any cache holds; `read` takes them all in, with PyTorch's threads."""

    def __init__(self, size: int) -> None:
        self._words = torch.ones(size // 8, dtype=torch.int64)
        self.size = self._words.nbytes

    def read(self) -> None:
        """A sum: integers need not wait for each other's rounding, so the loads are what takes the time."""
        self._words.sum()


def drop_page_cache(paths: Iterable[Path]) -> None:
    """Let the next reads of these files come from the disk."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # pages that are not on the disk yet would stay
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def bytes_from_disk(pid: int | None = None) -> int:
    """Read from storage by a process (this one) until now; what the page cache gave does not count."""
    lines = Path(f"/proc/{pid or os.getpid()}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _commit() -> str | None:
    """The commit of the working tree, marked when files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
