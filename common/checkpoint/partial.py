"""A directory that appears whole or not at all.

It is filled under the name `NAME.partial` beside its destination and renamed at the end. Who fills it holds
a lock on the file `NAME.partial.journal`, which the system releases when the process dies, so there is never
more than one. Here whatever goes wrong removes both; `resumable` keeps them for another run, and says in the
journal what is finished. What a killed process left is taken over by the next one with the same destination.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.errors import CheckpointError, Exhausted, Unavailable
from common.units import format_bytes

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Claim:
    """The right to fill `partial`, which becomes `destination`, and to read and write `journal`."""

    destination: Path
    partial: Path
    journal: BinaryIO
    keep: bool = False  # both are to stay for another run

    def publish(self) -> None:
        """The directory is complete and its files are synced: give it its name."""
        sync_directory(self.partial)
        self.partial.rename(self.destination)
        sync_directory(self.destination.parent)


@contextmanager
def partial_directory(destination: Path) -> Iterator[Path]:
    """Yield the directory to fill; at the end of the block it becomes `destination`, which must not exist.

    Raises Exhausted when the disk is full, CheckpointError when the destination exists or cannot be written,
    Unavailable while another process fills it. The caller syncs the files it writes; the directories are
    synced here.
    """
    with claimed(destination) as claim, write_errors(destination):
        shutil.rmtree(claim.partial, ignore_errors=True)
        claim.partial.mkdir()
        yield claim.partial
        claim.publish()


@contextmanager
def claimed(destination: Path) -> Iterator[Claim]:
    """Claim a destination that must not exist; at the end, partial directory and journal go unless kept."""
    check_absent(destination)
    partial = destination.with_name(f"{destination.name}.partial")
    with write_errors(destination):
        if not destination.parent.is_dir():
            raise CheckpointError(f"cannot write {destination}: {destination.parent} is not a directory")
        journal = _lock(destination, Path(f"{partial}.journal"))
    with journal:
        claim = Claim(destination, partial, journal)
        try:
            check_absent(destination)  # again: it may have been finished by whoever held the lock
            yield claim
        finally:
            # After publishing there is nothing left of this name; before it, an interrupt ends here as well.
            if not (claim.keep and partial.exists()):
                shutil.rmtree(partial, ignore_errors=True)
                Path(journal.name).unlink(missing_ok=True)


@contextmanager
def write_errors(destination: Path) -> Iterator[None]:
    """What the system says of a write that failed, in the words of this project."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise Exhausted(f"cannot write {destination}: no room on the disk{for_file(error)}") from error
        raise CheckpointError(f"cannot write {destination}: {error}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system name the file that is written; by themselves, only those of opening one do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def for_file(error: OSError) -> str:
    """Which file an error is about, in the words that a refusal ends with; nothing if it names none."""
    return f" for {Path(error.filename).name}" if error.filename else ""


def check_absent(destination: Path) -> None:
    """Refuse to write over what is there."""
    if destination.exists() or destination.is_symlink():  # a link to nothing is something, too
        raise CheckpointError(f"{destination} exists already; remove it or choose another name")


def check_room(destination: Path, needed: int) -> None:
    """Refuse at once what would fail after minutes of writing: no directory for it, or too small a disk."""
    if not destination.parent.is_dir():
        raise CheckpointError(f"cannot write {destination}: {destination.parent} is not a directory")
    if shutil.disk_usage(destination.parent).free < needed:
        raise no_room(destination, needed)


def no_room(destination: Path, needed: int, for_what: str = "") -> Exhausted:
    """The refusal of a disk or a quota that lacks room for `needed` more bytes, and for the file at hand."""
    free = shutil.disk_usage(destination.parent).free
    missing = f", so {format_bytes(needed - free)} are missing" if free < needed else ""
    return Exhausted(
        f"cannot write {destination}: no room on the disk{for_what}, where {format_bytes(free)} are free "
        f"and {format_bytes(needed)} are needed{missing}"
    )


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(destination: Path, path: Path) -> BinaryIO:
    """Open and lock the journal; Unavailable while another process holds it."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, file):
                return file
        except BaseException as error:
            file.close()
            if isinstance(error, BlockingIOError):
                raise Unavailable(
                    f"another process is writing {destination}; wait until it ends (it holds {path})"
                ) from None
            raise
        file.close()


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Its last holder may have removed the file after it was opened: a lock on it would protect nothing."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
