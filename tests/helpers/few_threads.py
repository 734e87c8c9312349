"""Code that runs in a process of its own which can start no more threads."""

from __future__ import annotations

import subprocess
import sys

# A thread's stack is address space: with none left, threads are what fails first.
_NO_ROOM = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))
"""


def without_more_threads(before: str, then: str) -> subprocess.CompletedProcess[str]:
    """Run `before`, take what threads need, and run `then`."""
    script = "\n".join((before, _NO_ROOM, then))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
