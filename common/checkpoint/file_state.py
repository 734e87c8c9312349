"""Whether a file is still what it was: its size and time of change, not its contents.

Inodes are left out, since some network and user-space file systems give a file another one at each look.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from common.errors import CheckpointError, Unavailable


class FileState(NamedTuple):
    """What changes when a file is written to, cut short or replaced."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, file: int | Path) -> FileState:
        """Of an open file or of a path; raises OSError."""
        status = os.stat(file)  # noqa: PTH116 (takes descriptors as well)
        return cls(status.st_size, status.st_mtime_ns)


def states_of(paths: Iterable[Path]) -> dict[Path, FileState]:
    """The state of each file now; raises CheckpointError for one that is gone."""
    try:
        return {path: FileState.of(path) for path in paths}
    except FileNotFoundError as error:
        raise changed(Path(error.filename)) from None
    except OSError as error:
        raise Unavailable(f"{error.filename} cannot be read: {error.strerror}") from error


def check_unchanged(states: dict[Path, FileState]) -> None:
    """Raise CheckpointError at the first file that is not what it was."""
    for path, state in states_of(states).items():
        if state != states[path]:
            raise changed(path)


def changed(path: Path, tensor: str = "it") -> CheckpointError:
    """The refusal of a file that is not what it was when it was opened, and of what was read then."""
    return CheckpointError(
        f"{path} changed while {tensor} was being read; wait until nothing writes to it, then try again"
    )
