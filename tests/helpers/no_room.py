"""Code that runs in a process of its own which gets no more memory, and so no more threads."""

from __future__ import annotations

import subprocess
import sys

_ROOM = 4 << 20  # bytes of address space, which a thread's stack takes as well

_LIMIT = f"""
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {_ROOM}, resource.RLIM_INFINITY))
"""


def without_more_room(before: str, then: str) -> subprocess.CompletedProcess[str]:
    """Run `before`, allow next to nothing more, and run `then`."""
    script = "\n".join((before, _LIMIT, then))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
