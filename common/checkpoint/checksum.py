"""Files with their SHA-256: computed while writing, and computed again from disk.

Owns what a checksum entry is; which files a packed checkpoint has is the manifest's affair.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from common.checkpoint.partial import writing

_CHUNK = 1 << 22
_FLUSHED_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class FileEntry:
    """Size and checksum of one file."""

    bytes: int
    sha256: str


class ChecksummedFile:
    """A new file, written front to back; `entry` describes it once the block has ended and it is on disk.

    Hashing and the way to the disk run on threads of their own beside writing: of the three, the slowest
    decides. An OSError of any of them names the file.
    """

    entry: FileEntry

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._threads = ThreadPoolExecutor(2, "checksum")
        self._flush: Future[None] | None = None
        self._unflushed = 0

    def write(self, data: bytes | memoryview) -> None:
        hashed = self._threads.submit(self._hash.update, data)
        try:
            with writing(self._path):
                self._file.write(data)
                self._flush_early(len(data))
        finally:
            hashed.result()

    def __enter__(self) -> ChecksummedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with writing(self._path), self._file, self._threads:
            if error is not None:
                return
            if self._flush is not None:
                self._flush.result()  # an error of the disk is told to one caller alone
            self._file.flush()
            os.fsync(self._file.fileno())
            self.entry = FileEntry(self._file.tell(), self._hash.hexdigest())

    def _flush_early(self, size: int) -> None:
        """Have the disk begin before the end: left alone, the system would keep it idle for gigabytes."""
        self._unflushed += size
        if self._unflushed < _FLUSHED_AT_ONCE or not (self._flush is None or self._flush.done()):
            return
        if self._flush is not None:
            self._flush.result()
        self._flush, self._unflushed = self._threads.submit(_flush_and_drop, self._file.fileno()), 0


def _flush_and_drop(descriptor: int) -> None:
    """Sync a file and give its pages back: what is larger than memory would push everything else out of it,
    and pages that are used again cost the system far less than new ones."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def checksum(path: Path, count: Callable[[int], None]) -> str:
    """SHA-256 of a file on disk, in hexadecimal; `count` is told the bytes of each piece as it is read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            count(size)
    return digest.hexdigest()
