"""A directory that appears whole or not at all, and that may be filled in more than one run.

Every finished file is synced, and only then noted in the journal beside the directory, with its size and
its SHA-256. A run with the same key (a hash of whatever decides the bytes: source, plan, versions) keeps the
files that the journal names and whose bytes still have that checksum; all else that lies there is removed and
written again. Files are the unit: one that was half written is redone.

What is finished stays after an interrupt, a kill, a power loss, a full disk or a failing one. It is removed
after an error that the next run would meet again, and by a run with another key.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from common.checkpoint.checksum import ChecksummedFile, FileEntry, checksum
from common.checkpoint.partial import (
    NO_ROOM,
    Claim,
    check_room,
    claimed,
    for_file,
    no_room,
    sync_directory,
    writing,
)
from common.errors import CheckpointError, ConfigError, ServingError

_logger = logging.getLogger(__name__)


class ResumableDirectory:
    """The directory while it is filled; `finished` are the files that need not be written any more.

    A file goes from absent to written to synced to noted in the journal, which makes it finished.
    """

    def __init__(self, claim: Claim, key: str, sizes: Mapping[str, int]) -> None:
        self.path = claim.partial
        self._journal = claim.journal
        self._key = key
        self._sizes = sizes
        self.finished = self._read_journal()

    @property
    def missing(self) -> int:
        """Bytes still to be written."""
        return sum(size for name, size in self._sizes.items() if name not in self.finished)

    def recover(self) -> None:
        """Keep what an earlier run finished, and nothing else."""
        if not self.finished:  # nothing, or of another key
            shutil.rmtree(self.path, ignore_errors=True)
            self._journal.truncate(0)
            self._append({"key": self._key})
        self.path.mkdir(exist_ok=True)
        sync_directory(self.path.parent)
        for name, entry in list(self.finished.items()):
            if name not in self._sizes or not _is_whole(self.path / name, entry):
                del self.finished[name]
        self.remove_unfinished()
        if self.finished:
            _logger.info("going on with %s, where %d files are finished", self.path, len(self.finished))

    def write(self, name: str, fill: Callable[[ChecksummedFile], object]) -> None:
        """Let `fill` write the file `name`, unless it is finished already."""
        if name in self.finished:
            return
        with ChecksummedFile(self.path / name) as file:
            fill(file)
        sync_directory(self.path)
        self._append({"name": name, **asdict(file.entry)})
        self.finished[name] = file.entry

    def remove_unfinished(self) -> None:
        """Remove every file that is not finished."""
        for path in list(self.path.iterdir()):
            if path.name not in self.finished:
                path.unlink()

    def _append(self, line: Mapping[str, object]) -> None:
        with writing(Path(self._journal.name)):
            self._journal.write(json.dumps(line).encode() + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())

    def _read_journal(self) -> dict[str, FileEntry]:
        """What the journal says is finished; nothing if it is of another key. A torn last line is cut off."""
        self._journal.seek(0)
        finished: dict[str, FileEntry] = {}
        whole = 0
        for number, line in enumerate(self._journal):
            try:
                noted = json.loads(line)
                if number == 0 and noted != {"key": self._key}:
                    return {}
                if number > 0 and line.endswith(b"\n"):
                    finished[noted["name"]] = FileEntry(noted["bytes"], noted["sha256"])
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line) if line.endswith(b"\n") else 0
        self._journal.truncate(whole)
        return finished


@contextmanager
def resumable_directory(
    destination: Path, key: str, sizes: Mapping[str, int]
) -> Iterator[ResumableDirectory]:
    """Yield the directory to fill; at the end of the block it becomes `destination`, which must not exist.

    `sizes` are those of the files that will be written, by name. Raises Exhausted when the disk is too small
    or full, CheckpointError when the destination exists or cannot be written, Unavailable while another
    process fills it.
    """
    with claimed(destination) as claim:
        directory = ResumableDirectory(claim, key, sizes)
        try:
            directory.recover()
            check_room(destination, directory.missing)
            yield directory
            claim.publish()
        except BaseException as error:
            claim.keep = bool(directory.finished) and not isinstance(error, (CheckpointError, ConfigError))
            advice = _advice(directory) if claim.keep else ""
            if isinstance(error, OSError):
                raise _refusal(error, destination, directory, advice) from error
            if advice and isinstance(error, ServingError):
                raise type(error)(f"{error}; {advice}") from error
            if advice and isinstance(error, (KeyboardInterrupt, SystemExit)):
                _logger.warning("interrupted; %s", advice)
            raise


def _advice(directory: ResumableDirectory) -> str:
    return f"what is finished is kept in {directory.path}: run the same command again to go on"


def _refusal(error: OSError, destination: Path, directory: ResumableDirectory, advice: str) -> ServingError:
    if error.errno not in NO_ROOM:
        return CheckpointError(f"cannot write {destination}: {error}" + (f"; {advice}" if advice else ""))
    with suppress(OSError):
        directory.remove_unfinished()
    refusal = no_room(destination, directory.missing, for_file(error))
    return type(refusal)(f"{refusal}; make room; {advice}") if advice else refusal


def _is_whole(path: Path, entry: FileEntry) -> bool:
    try:
        return path.stat().st_size == entry.bytes and checksum(path, lambda _: None) == entry.sha256
    except OSError:
        return False
