"""The arena: its words, its two mappings, and what is left of it when a process dies."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import arena as arena_module
from common.arena import (
    ArenaShape,
    Entry,
    MappedArena,
    OwnedArena,
    State,
    decode_entry,
    encode_entry,
    reclaim_dead_segments,
)
from common.errors import Exhausted, Incompatible
from common.expert_key import ExpertKey

DIGEST = "0123456789abcdef" * 2
SHAPE = ArenaShape(DIGEST, layers=2, experts=3, frames=4, stride=4096)
KEY = ExpertKey(1, 2)


@pytest.fixture
def owned() -> Iterator[OwnedArena]:
    arena = OwnedArena(SHAPE)
    arena.commit(list(range(SHAPE.frames)))
    yield arena
    arena.close()


@given(
    state=st.sampled_from(State),
    frame=st.integers(0, (1 << 30) - 1),
    generation=st.integers(0, (1 << 32) - 1),
)
def test_words_round_trip(state: State, frame: int, generation: int) -> None:
    assert decode_entry(encode_entry(state, frame, generation)) == Entry(state, frame, generation)


def test_header_round_trip_and_refusals() -> None:
    assert ArenaShape.unpack(SHAPE.pack()) == SHAPE
    with pytest.raises(Incompatible, match="version"):
        ArenaShape.unpack(b"NOTARENA" + SHAPE.pack()[8:])
    with pytest.raises(Incompatible, match="contradicts"):
        ArenaShape.unpack(SHAPE._replace(frames=5).pack()[:-8] + SHAPE.pack()[-8:])


def test_a_worker_reads_what_the_store_published(owned: OwnedArena) -> None:
    mapped = MappedArena(owned.path, DIGEST)
    out = torch.zeros(SHAPE.stride, dtype=torch.uint8)
    assert not mapped.read(KEY, out)
    record = torch.randint(0, 256, (SHAPE.stride,), dtype=torch.uint8)
    owned.frames[3] = record
    owned.publish(KEY, Entry(State.STAGING, 3, 1))
    assert not mapped.read(KEY, out)
    owned.publish(KEY, Entry(State.READY, 3, 2))
    assert mapped.read(KEY, out)
    assert torch.equal(out, record)


def test_a_frame_reused_while_it_is_copied_is_noticed(owned: OwnedArena) -> None:
    """The seqlock: without the second load, a torn record would be taken for whole."""
    mapped = MappedArena(owned.path, DIGEST)
    owned.publish(KEY, Entry(State.READY, 3, 7))

    class ReusedDuringCopy:
        is_cpu, nbytes = False, SHAPE.stride

        def is_contiguous(self) -> bool:
            return True

        def copy_(self, frame: torch.Tensor) -> None:
            owned.publish(KEY, Entry(State.ABSENT, 0, 8))
            owned.publish(KEY, Entry(State.READY, 3, 9))  # the same frame, another generation

    assert not mapped.read(KEY, ReusedDuringCopy())  # type: ignore[arg-type]


def test_frames_without_memory_receive_what_a_file_holds(tmp_path: Path) -> None:
    """In any order, from any place of the file; frames that had memory get it as well."""
    records = torch.randint(0, 256, (3, SHAPE.stride), dtype=torch.uint8)
    (tmp_path / "records").write_bytes(b"head" + records.numpy().tobytes())
    arena = OwnedArena(SHAPE)
    try:
        arena.commit([1])
        assert arena.has_memory([1]) and not arena.has_memory([1, 3])
        with (tmp_path / "records").open("rb") as file:
            assert arena.receive([3, 1], file.fileno(), 4)
            assert torch.equal(arena.frames[[3, 1]], records[:2])
            assert arena.has_memory([3, 1])
            assert not arena.receive([0, 2], file.fileno(), 4 + 2 * SHAPE.stride), "the file ends before"
            assert arena.has_memory([0]) and not arena.has_memory([2])
            assert torch.equal(arena.frames[0], records[2])
    finally:
        arena.close()


@pytest.mark.parametrize(("cause", "expected"), [(errno.ENOSPC, Exhausted), (errno.EIO, OSError)])
def test_no_memory_is_told_from_a_file_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, cause: int, expected: type[Exception]
) -> None:
    def fail(*_: int) -> int:
        raise OSError(cause, os.strerror(cause))

    monkeypatch.setattr(os, "sendfile", fail)
    arena = OwnedArena(SHAPE)
    try:
        with pytest.raises(expected, match=os.strerror(cause)) as caught:
            arena.receive([0], 0, 0)
        assert ("--ram" in str(caught.value)) == (expected is Exhausted)
        assert not arena.has_memory([0])
    finally:
        arena.close()


def test_the_workers_mapping_cannot_be_written(owned: OwnedArena) -> None:
    """Writing kills the writer by SIGSEGV, and the store's bytes stay."""
    with child(f"MappedArena(Path({str(owned.path)!r}), {DIGEST!r}).frames[0, 0] = 1") as process:
        assert process.wait(60) == -signal.SIGSEGV
    assert not owned.frames.any()


def test_another_layout_is_refused(owned: OwnedArena) -> None:
    with pytest.raises(Incompatible, match="another layout"):
        MappedArena(owned.path, "f" * 32)


@pytest.mark.parametrize("size", [0, 100, 4096, SHAPE.size - 1])
def test_a_segment_that_was_cut_is_refused(owned: OwnedArena, tmp_path: Path, size: int) -> None:
    """Mapped all the same, it would kill the worker at the first frame that is not there."""
    cut = tmp_path / "arena"
    cut.write_bytes(owned.path.read_bytes()[:size])
    with pytest.raises(Incompatible, match="shorter than"):
        MappedArena(cut, DIGEST)


def test_the_segment_is_private_and_removed() -> None:
    arena = OwnedArena(SHAPE)
    assert arena.path.stat().st_mode & 0o777 == 0o600
    mapped = MappedArena(arena.path, DIGEST)
    arena.publish(KEY, Entry(State.READY, 0, 1))
    arena.close()
    assert not arena.path.exists()
    assert mapped.is_ready(KEY)  # the mapping outlives the store


def test_segments_of_a_killed_store_are_reclaimed_but_no_living_ones(owned: OwnedArena) -> None:
    hang = f"print(OwnedArena(ArenaShape{tuple(SHAPE)}).path, flush=True); import signal; signal.pause()"
    with child(hang) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert path.exists()
        assert path not in reclaim_dead_segments()
        process.kill()
        process.wait(60)
        assert path in reclaim_dead_segments()
    assert not path.exists()
    assert owned.path.exists()


@contextmanager
def child(statement: str) -> Iterator[subprocess.Popen[str]]:
    """Another process, running one statement with this module's names."""
    names = "from pathlib import Path; from common.arena import *; from common.arena import ArenaShape"
    command = [sys.executable, "-c", f"{names}; {statement}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_an_arena_larger_than_shared_memory_is_refused() -> None:
    before = set(arena_module.SEGMENT_DIRECTORY.iterdir())
    with pytest.raises(Exhausted, match="--ram"):
        OwnedArena(SHAPE._replace(frames=1 << 29))
    assert set(arena_module.SEGMENT_DIRECTORY.iterdir()) == before
