"""Which processes of this machine are trusted with memory and messages: those of the same user alone.

The arena and the data plane carry no keys; the kernel says whose a file or a socket is.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from common.errors import PermissionDenied

IPC = "ipc://"


def open_own(path: Path) -> int:
    """A descriptor to read a file that belongs to this user alone; PermissionDenied for any other."""
    try:
        # Not to wait for the writer of a pipe, should it be one.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EACCES):
            raise PermissionDenied(f"{path} is a link, or another user's") from None
        raise
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or _belongs_to_others(status):
        os.close(file)
        raise PermissionDenied(f"{path} is no file of this user alone; its maker is not to be trusted")
    return file


def check_own_endpoint(endpoint: str) -> None:
    """Raises PermissionDenied unless an endpoint is a unix socket of this user; OSError if it is gone."""
    path = Path(endpoint.removeprefix(IPC))
    if not endpoint.startswith(IPC) or not path.is_absolute():
        raise PermissionDenied(f"the data plane is a socket of this machine, and {endpoint!r} is none")
    status = path.lstat()
    if not stat.S_ISSOCK(status.st_mode) or _belongs_to_others(status):
        raise PermissionDenied(f"{path} is no socket of this user alone; its maker is not to be trusted")


def _belongs_to_others(status: os.stat_result) -> bool:
    """Whether another user made it or may have written to it."""
    return status.st_uid != os.getuid() or bool(status.st_mode & 0o022)
