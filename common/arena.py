"""The arena: one shared host segment that the store owns and every worker maps read-only.

Layout: header (one page), directory (one 64-bit word per expert), frames (one record each). This file owns
the segment's life and its memory format; which record goes to which frame is the store's affair
(`expert_store.frames`), and what a record contains is `common.record`.

Concurrency. A directory word holds state, frame and generation together and is stored and loaded as one
aligned 8-byte word, so a reader never sees half an entry. The store withdraws an entry *before* it writes
to the frame; a reader loads the word, copies the frame, and loads the word again: if both are the same
READY word, the copy is whole. (A worker on the CPU computes from the frame where another copies it, and
throws the result away if the words differ.) This is a seqlock; it relies on loads and stores each keeping
their order, which x86-64 guarantees and interpreted code does not reorder. A lease (a pin in the store) is
what makes sure a staged frame is still there when the worker comes; the generation is what makes a copy safe.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import threading
import warnings
from collections.abc import Callable, Sequence
from enum import IntEnum
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import Exhausted, Incompatible
from common.expert_key import ExpertKey
from common.ownership import open_own
from common.units import format_bytes

SEGMENT_DIRECTORY = Path("/dev/shm")  # noqa: S108 -- names are random, and what is opened is checked to be ours
_MAGIC = b"EXARENA\x00"
_VERSION = 1
_HEADER = struct.Struct("<8sII32sQQQQQ")
_HEADER_BYTES = 4096
_FRAME_ALIGNMENT = 2 << 20  # frames start on a huge page where the kernel has them
_NO_MEMORY = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)
_libc = ctypes.CDLL(None, use_errno=True)


class State(IntEnum):
    """What a directory entry says of its expert."""

    ABSENT = 0
    STAGING = 1
    READY = 2


class Entry(NamedTuple):
    """One decoded directory word."""

    state: State
    frame: int
    generation: int


class ArenaShape(NamedTuple):
    """What a header describes; computed sizes follow from it."""

    layout_digest: str
    layers: int
    experts: int
    frames: int
    stride: int

    @property
    def frames_offset(self) -> int:
        end = _HEADER_BYTES + 8 * self.layers * self.experts
        return -(-end // _FRAME_ALIGNMENT) * _FRAME_ALIGNMENT

    @property
    def size(self) -> int:
        return self.frames_offset + self.frames * self.stride

    def pack(self) -> bytes:
        digest = self.layout_digest.encode()
        counts = (self.layers, self.experts, self.frames, self.stride)
        return _HEADER.pack(_MAGIC, _VERSION, 0, digest, *counts, self.size)

    @classmethod
    def unpack(cls, header: bytes) -> ArenaShape:
        magic, version, _, digest, layers, experts, frames, stride, size = _HEADER.unpack_from(header)
        if magic != _MAGIC or version != _VERSION:
            raise Incompatible(f"not an arena of version {_VERSION}: magic {magic!r}, version {version}")
        shape = cls(digest.decode(), layers, experts, frames, stride)
        if shape.size != size:
            raise Incompatible(f"arena header contradicts itself: {size} bytes named, {shape.size} computed")
        return shape


def encode_entry(state: State, frame: int, generation: int) -> int:
    """generation (32 bits) | frame (30) | state (2), in one word."""
    return (generation & 0xFFFFFFFF) << 32 | frame << 2 | state


def decode_entry(word: int) -> Entry:
    return Entry(State(word & 3), word >> 2 & 0x3FFFFFFF, word >> 32)


class Arena:
    """A mapping of the segment, as both sides see it."""

    def __init__(self, path: Path, shape: ArenaShape, mapping: mmap.mmap) -> None:
        self.path, self.shape = path, shape
        self._mapping = mapping
        words = np.frombuffer(mapping, np.uint64, shape.layers * shape.experts, _HEADER_BYTES)
        self.words = words.reshape(shape.layers, shape.experts)
        with warnings.catch_warnings():
            # The worker's mapping is read-only, which a tensor cannot express; nothing writes through it.
            warnings.filterwarnings("ignore", message=".*not writable")
            run = torch.frombuffer(
                mapping, dtype=torch.uint8, count=shape.frames * shape.stride, offset=shape.frames_offset
            )
        self.frames = run.view(shape.frames, shape.stride)

    def entry(self, key: ExpertKey) -> Entry:
        return decode_entry(int(self.words[key]))


class OwnedArena(Arena):
    """The store's side: creates, fills and removes the segment.

    The segment is unnamed until it is locked, so a successor never takes a starting store for a dead one.
    """

    def __init__(self, shape: ArenaShape) -> None:
        """Raises Exhausted when shared memory cannot hold the arena."""
        available = os.statvfs(SEGMENT_DIRECTORY)
        if shape.size > available.f_bavail * available.f_frsize:
            free = format_bytes(available.f_bavail * available.f_frsize)
            raise Exhausted(
                f"the arena needs {format_bytes(shape.size)} of shared memory, but {SEGMENT_DIRECTORY} has "
                f"{free} free; give a smaller --ram, or enlarge {SEGMENT_DIRECTORY}"
            )
        self._file = os.open(SEGMENT_DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            os.ftruncate(self._file, shape.size)
            mapping = mmap.mmap(self._file, shape.size)
            mapping.madvise(mmap.MADV_HUGEPAGE)
            mapping[: _HEADER.size] = shape.pack()
            path = SEGMENT_DIRECTORY / f"{_segment_prefix()}{os.getpid()}-{os.urandom(4).hex()}.arena"
            super().__init__(path, shape, mapping)
            # Last, so that nothing named is left by a failure above. With a directory descriptor Python calls
            # linkat, which follows the link; link(2) would not.
            os.link(f"/proc/self/fd/{self._file}", path, src_dir_fd=self._file, follow_symlinks=True)
        except BaseException:
            os.close(self._file)
            raise
        self.page_locked = True
        self._receiving = threading.local()
        self._opened: list[FileIO] = []
        self._committed = [False] * shape.frames

    def commit(self, frames: list[int]) -> None:
        """Give frames real memory and lock it, once; Exhausted when there is none. Any thread may call it.

        Without this a full /dev/shm would kill the process by SIGBUS at the first touch.
        """
        for frame in frames:
            if not self._committed[frame]:
                try:
                    os.posix_fallocate(self._file, self._offset(frame), self.shape.stride)
                except OSError as error:
                    raise _no_memory(error) from None
                self._lock(frame)

    def has_memory(self, frames: list[int]) -> bool:
        """Whether frames have been committed or received, so that they can be written to."""
        return all(self._committed[frame] for frame in frames)

    def receive(self, frames: list[int], file: int, position: int) -> bool:
        """Fill frames, one after the other, from a file's `position` on; False if the file ends before.

        For frames without memory, which get it as by `commit`, and for less: the kernel makes each page from
        the bytes it receives, where otherwise it clears it first and maps it alone.
        """
        segment = self._segment()
        for frame in frames:
            segment.seek(self._offset(frame))
            end = position + self.shape.stride
            while position < end:
                try:
                    count = os.sendfile(segment.fileno(), file, position, end - position)
                except OSError as error:
                    raise (_no_memory(error) if error.errno in _NO_MEMORY else error) from None
                if count == 0:
                    return False
                position += count
            self._lock(frame)
        return True

    def _segment(self) -> FileIO:
        """The segment opened anew, so that it has a position of this thread's own; once, so that staging
        goes on where no more files can be opened."""
        if not hasattr(self._receiving, "segment"):
            self._receiving.segment = FileIO(f"/proc/self/fd/{self._file}", "r+")
            self._opened.append(self._receiving.segment)
        segment: FileIO = self._receiving.segment
        return segment

    def _offset(self, frame: int) -> int:
        return self.shape.frames_offset + frame * self.shape.stride

    def _lock(self, frame: int) -> None:
        """The frame has memory, every page of it."""
        address = self.frames.data_ptr() + frame * self.shape.stride
        if _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(self.shape.stride)):
            self.page_locked = False  # RLIMIT_MEMLOCK: works, but the kernel may swap frames out
        self._committed[frame] = True

    def publish(self, key: ExpertKey, entry: Entry) -> None:
        """Store one directory word; see the module's note on order."""
        self.words[key] = encode_entry(*entry)

    def close(self) -> None:
        """Remove the segment's name; mappings of workers that still decode stay valid."""
        self.path.unlink(missing_ok=True)
        for segment in self._opened:
            segment.close()
        os.close(self._file)


class MappedArena(Arena):
    """A worker's side: a read-only mapping, valid even after the store has died."""

    def __init__(self, path: Path, layout_digest: str) -> None:
        """Raises Incompatible when the segment is not an arena of this record layout, whole, and
        PermissionDenied when another user could have made it."""
        file = open_own(path)
        try:
            if os.fstat(file).st_size < _HEADER_BYTES:
                raise Incompatible(f"{path} is no arena: it is shorter than a header")
            shape = ArenaShape.unpack(os.pread(file, _HEADER.size, 0))
            if os.fstat(file).st_size < shape.size:
                raise Incompatible(f"arena {path} is shorter than its header says")
            if shape.layout_digest != layout_digest:
                raise Incompatible(f"arena {path} holds records of another layout ({shape.layout_digest})")
            mapping = mmap.mmap(file, shape.size, prot=mmap.PROT_READ)
        finally:
            os.close(file)
        super().__init__(path, shape, mapping)

    def is_ready(self, key: ExpertKey) -> bool:
        return self.entry(key).state is State.READY

    def missing(self) -> int:
        """How many experts are not READY."""
        return int((self.words & 3 != State.READY).sum())

    def frame_of(self) -> np.ndarray:
        """The frame of each expert, all of which must be READY: (layers, experts) int32."""
        assert self.missing() == 0
        return (self.words >> 2 & 0x3FFFFFFF).astype(np.int32)

    def use(self, keys: Sequence[ExpertKey], action: Callable[[list[int], list[Tensor]], None]) -> list[int]:
        """Hand over the frames of those of `keys` that are READY; returns the places in `keys` of the others.

        `action` gets places in `keys` and frames (stride,). A frame that was reused while it ran counts as
        not READY: whatever was made of it is to be thrown away.
        """
        words = [int(self.words[key]) for key in keys]
        entries = [decode_entry(word) for word in words]
        ready = [place for place, entry in enumerate(entries) if entry.state is State.READY]
        if ready:
            action(ready, [self.frames[entries[place].frame] for place in ready])
        whole = {place for place in ready if int(self.words[keys[place]]) == words[place]}
        return [place for place in range(len(keys)) if place not in whole]

    def read(self, key: ExpertKey, out: Tensor) -> bool:
        """Copy the record into `out` (stride,); False unless READY and left alone meanwhile."""
        assert out.is_contiguous() and out.nbytes == self.shape.stride

        def copy(places: list[int], frames: list[Tensor]) -> None:
            if out.is_cpu:
                # torch would spread the copy over threads, which wait for each other on a busy machine, while
                # one memcpy already takes what a core can move.
                ctypes.memmove(out.data_ptr(), frames[0].data_ptr(), self.shape.stride)
            else:
                out.copy_(frames[0])

        return not self.use([key], copy)


def reclaim_dead_segments() -> list[Path]:
    """Remove segments of this user whose store is dead (nobody holds their lock)."""
    removed = []
    for path in SEGMENT_DIRECTORY.glob(f"{_segment_prefix()}*.arena"):
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # gone by now, or put there by another user
        try:
            if os.fstat(file).st_uid == os.getuid():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                removed.append(path)
        except BlockingIOError:
            pass  # its store lives
        finally:
            os.close(file)
    return removed


def _no_memory(error: OSError) -> Exhausted:
    return Exhausted(f"no memory for arena frames ({error.strerror}); give a smaller --ram")


def _segment_prefix() -> str:
    return f"expert-serving-{os.getuid()}-"
