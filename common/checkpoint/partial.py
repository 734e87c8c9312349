"""A directory that appears whole or not at all.

It is filled under the name `NAME.partial-PID` beside its destination and renamed at the end; whatever goes
wrong in between removes it. What a killed process left is removed by the next one that fills the same
destination.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import CheckpointError, Exhausted
from common.units import format_bytes

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def partial_directory(destination: Path) -> Iterator[Path]:
    """Yield the directory to fill; at the end of the block it becomes `destination`, which must not exist.

    Raises Exhausted when the disk is full, CheckpointError when the destination exists or cannot be written.
    The caller syncs the files it writes; the directories are synced here.
    """
    if destination.exists():
        raise CheckpointError(f"{destination} exists already; remove it or choose another name")
    partial = destination.with_name(f"{destination.name}.partial-{os.getpid()}")
    try:
        _remove_stale(destination)
        partial.mkdir()
        yield partial
        _sync(partial)
        partial.rename(destination)
        _sync(destination.parent)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise Exhausted(f"cannot write {destination}: no room on the disk") from error
        raise CheckpointError(f"cannot write {destination}: {error}") from error
    finally:
        # After the rename there is nothing left of this name; before it, an interrupt ends here as well.
        shutil.rmtree(partial, ignore_errors=True)


def check_room(destination: Path, needed: int) -> None:
    """Refuse at once what would fail after minutes of writing: no directory for it, or too small a disk."""
    if not destination.parent.is_dir():
        raise CheckpointError(f"cannot write {destination}: {destination.parent} is not a directory")
    free = shutil.disk_usage(destination.parent).free
    if free < needed:
        raise Exhausted(
            f"cannot write {destination}: no room on the disk, where {format_bytes(free)} are free and "
            f"{format_bytes(needed)} are needed"
        )


def _remove_stale(destination: Path) -> None:
    prefix = f"{destination.name}.partial-"
    for sibling in list(destination.parent.iterdir()):
        pid = sibling.name.removeprefix(prefix)
        if pid != sibling.name and pid.isdecimal() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(sibling, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(directory: Path) -> None:
    """Make the names in a directory survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
