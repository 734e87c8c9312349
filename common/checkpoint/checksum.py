"""Files with their SHA-256: computed while writing, and computed again from disk.

Owns what a checksum entry is; which files a packed checkpoint has is the manifest's affair.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """Size and checksum of one file."""

    bytes: int
    sha256: str


class ChecksummedFile:
    """A new file, written front to back; `entry` describes it once the block has ended and it is on disk."""

    entry: FileEntry

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)

    def __enter__(self) -> ChecksummedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is not None:
                return
            self._file.flush()
            os.fsync(self._file.fileno())
            self.entry = FileEntry(self._file.tell(), self._hash.hexdigest())


def checksum(path: Path, count: Callable[[int], None]) -> str:
    """SHA-256 of a file on disk, in hexadecimal; `count` is told the bytes of each piece as it is read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            count(size)
    return digest.hexdigest()
