"""A checksummed file: what it says of itself is true, and no error of the disk is lost."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from common.checkpoint import checksum
from common.checkpoint.checksum import ChecksummedFile, FileEntry


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush after every few bytes."""
    monkeypatch.setattr(checksum, "_FLUSHED_AT_ONCE", 8)


@pytest.mark.usefixtures("early")
def test_entry_describes_what_was_written(tmp_path: Path) -> None:
    pieces = [bytes([i]) * (i * 1000) for i in range(20)]
    with ChecksummedFile(tmp_path / "file") as file:
        for piece in pieces:
            file.write(memoryview(piece))
    content = (tmp_path / "file").read_bytes()
    assert content == b"".join(pieces)
    assert file.entry == FileEntry(len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.usefixtures("early")
def test_an_error_of_an_early_flush_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells it once; a file that is synced again without complaint may still lack pages."""
    sync, calls = os.fsync, []

    def fails_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_once)
    with (
        pytest.raises(OSError, match=os.strerror(errno.EIO)),
        ChecksummedFile(tmp_path / "file") as file,
    ):
        file.write(b"more than eight bytes")
    assert calls and not hasattr(file, "entry")


def test_a_block_that_fails_leaves_no_entry(tmp_path: Path) -> None:
    file = ChecksummedFile(tmp_path / "file")
    error = ValueError("stop")
    file.write(b"half")
    file.__exit__(ValueError, error, None)
    assert not hasattr(file, "entry")
