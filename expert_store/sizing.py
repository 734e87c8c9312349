"""How many frames the arena has: what was asked for, or what memory allows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from common.arena import SEGMENT_DIRECTORY
from common.errors import ConfigError
from common.units import format_bytes

# Of the memory that is free now, left alone when the store chooses its own budget: the operating system, the
# worker's dense weights and the page cache of the files being read.
_HEADROOM = 0.15


@dataclass(frozen=True)
class FrameBudget:
    """How many frames, and the reason in words for the log."""

    frames: int
    reason: str


def choose_frames(ram: int | None, stride: int, experts: int) -> FrameBudget:
    """Frames for `experts` records of `stride` bytes; ConfigError when not even one fits."""
    needed = stride * experts
    if ram is not None:
        if ram < stride:
            raise ConfigError(
                f"--ram {format_bytes(ram)} cannot hold one record; the smallest is {format_bytes(stride)}"
            )
        frames = min(experts, ram // stride)
        return FrameBudget(frames, f"--ram {format_bytes(ram)} holds {frames} of {experts} experts")
    shared = os.statvfs(SEGMENT_DIRECTORY)
    usable = int(min(available_memory(), shared.f_bavail * shared.f_frsize) * (1 - _HEADROOM))
    if needed <= usable:
        return FrameBudget(experts, f"all {experts} experts fit: {format_bytes(needed)}")
    if usable < stride:
        raise ConfigError(f"not even one record of {format_bytes(stride)} fits into free memory")
    frames = usable // stride
    return FrameBudget(frames, f"{format_bytes(usable)} of memory are free, so {frames} of {experts} experts")


def available_memory() -> int:
    """MemAvailable of this machine, capped by its control group if it has a limit; bytes."""
    text = Path("/proc/meminfo").read_text()
    kilobytes = next(line.split()[1] for line in text.splitlines() if line.startswith("MemAvailable"))
    available = int(kilobytes) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        statistics = Path("/sys/fs/cgroup/memory.stat").read_text().split()
        used -= int(statistics[statistics.index("inactive_file") + 1])  # page cache, given up when needed
    except (OSError, ValueError):  # no such control group
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))
