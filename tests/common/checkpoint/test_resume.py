"""An interrupted pack goes on where it stopped, and whatever cannot be gone on with leaves nothing behind."""

import errno
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from common.checkpoint import PackedCheckpoint, checksum, open_checkpoint
from common.checkpoint.packed import DENSE, layer_file
from common.checkpoint.packed_writer import pack
from common.checkpoint.packing import PUBLISHED
from common.checkpoint.partial import partial_directory
from common.checkpoint.plan import make_plan
from common.errors import CheckpointError, Exhausted, Unavailable
from tests.helpers.models import edited_tensors, pack_model, unpack_model

FIRST, SECOND = layer_file(0), layer_file(1)
WEIGHTS = "model.safetensors"
AN_EXPERT = r"backbone\.layers\.[13]\.mixer\.experts\.\d\.(up|down)_proj\.weight"


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    """Where to pack: alone in its directory, so that leftovers are easy to see."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "packed"


@pytest.fixture
def partial(destination: Path) -> Path:
    return destination.with_name("packed.partial")


@pytest.fixture
def journal(destination: Path) -> Path:
    return destination.with_name("packed.partial.journal")


class After:
    """A progress callback that acts once: when dense weights and `experts` of the 16 experts are done."""

    def __init__(self, source: Path, experts: int, act: Callable[[], object]) -> None:
        checkpoint = open_checkpoint(source)
        dense = sum(stored.size for stored in checkpoint.dense_stored.values())
        self._threshold = dense + checkpoint.routed_bytes * experts // 16
        self._act = act
        self.reports: list[int] = []

    def __call__(self, done: int, total: int) -> None:
        self.reports.append(done)
        if done == self._threshold:
            self._act()


def interrupt() -> None:
    raise KeyboardInterrupt


def pack_until(source: Path, destination: Path, experts: int, act: Callable[[], object] = interrupt) -> After:
    """Pack at 5 bits, and `act` once `experts` are done."""
    progress = After(source, experts, act)
    checkpoint = open_checkpoint(source)
    pack(checkpoint, destination, make_plan(checkpoint), progress)
    return progress


def pack_all(source: Path, destination: Path) -> list[int]:
    """Pack at 5 bits; what was reported as done: first what was kept, then each step."""
    return pack_until(source, destination, 17).reports


def interrupted(source: Path, destination: Path, experts: int = 11) -> list[int]:
    """The same, interrupted once `experts` are done."""
    progress = After(source, experts, interrupt)
    checkpoint = open_checkpoint(source)
    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, destination, make_plan(checkpoint), progress)
    return progress.reports


def assert_nothing_left(destination: Path) -> None:
    assert list(destination.parent.iterdir()) == []


def assert_packed(destination: Path, expected: Path) -> None:
    """Byte for byte what an uninterrupted run makes, and nothing beside it."""
    assert list(destination.parent.iterdir()) == [destination]
    assert {path.name for path in destination.iterdir()} == {path.name for path in expected.iterdir()}
    packed = PackedCheckpoint.open(destination)
    assert packed.fingerprint == PackedCheckpoint.open(expected).fingerprint
    assert packed.manifest.damaged_files(destination, lambda *_: None) == []


def inodes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in directory.iterdir()}


def test_goes_on_after_an_interrupt(
    pristine: Path, pristine_packed: Path, destination: Path, partial: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(pristine, destination)
    assert "run the same command again to go on" in caplog.text and str(partial) in caplog.text
    assert not destination.exists()
    kept = inodes(partial)
    assert {DENSE, FIRST} <= kept.keys()
    reports = pack_all(pristine, destination)
    assert_packed(destination, pristine_packed)
    assert {name: inodes(destination)[name] for name in (DENSE, FIRST)} == {
        name: kept[name] for name in (DENSE, FIRST)
    }
    assert reports[0] > reports[-1] / 2 and len(reports) == 1 + 8, "what was finished was not redone"


@pytest.mark.parametrize("then", [b"{}", None])
def test_what_travels_along_is_as_the_last_run_found_it(
    pristine_packed: Path, destination: Path, tmp_path: Path, then: bytes | None
) -> None:
    """Also where the source's own checksums do not speak of it."""
    source = tmp_path / "source"
    shutil.copytree(pristine_packed, source)
    (source / "vocab.json").write_bytes(b"[]")
    interrupted(source, destination)
    (source / "vocab.json").unlink() if then is None else (source / "vocab.json").write_bytes(then)
    pack_all(source, destination)
    made, manifest = destination / "vocab.json", PackedCheckpoint.open(destination).manifest
    assert (made.read_bytes() if made.exists() else None) == then
    assert ("vocab.json" in manifest.files) == (then is not None)


@pytest.mark.parametrize("what", [pack_model, unpack_model])
def test_what_travels_along_must_be_readable(
    pristine_packed: Path,
    destination: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: Callable[..., object],
) -> None:
    source, read = tmp_path / "source", Path.read_bytes
    shutil.copytree(pristine_packed, source)
    (source / "tokenizer.json").write_bytes(b"{}")

    def fails(path: Path) -> bytes:
        if path.name == "tokenizer.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        said = f"{source / 'tokenizer.json'} cannot be read: Input/output error"
        with pytest.raises(Unavailable, match=f"^{re.escape(said)}$"):
            what(source, destination)
    assert_nothing_left(destination)


def test_a_link_to_nothing_is_not_written_over(pristine_packed: Path, destination: Path) -> None:
    destination.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="exists already"):
        pack_model(pristine_packed, destination)
    assert list(destination.parent.iterdir()) == [destination]


def test_an_interrupt_while_finished_files_are_checked_keeps_them(
    pristine: Path, pristine_packed: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(pristine, destination)
    with monkeypatch.context() as patch:
        patch.setattr("common.checkpoint.resumable.checksum", lambda *call: interrupt())
        interrupted(pristine, destination)
    assert pack_all(pristine, destination)[0] > 0
    assert_packed(destination, pristine_packed)


def test_an_interrupt_before_anything_is_finished_leaves_nothing(pristine: Path, destination: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.checkpoint.packed_writer._write", lambda *call: interrupt())
        interrupted(pristine, destination)
    assert_nothing_left(destination)


HOLD = """
import sys
from pathlib import Path
from common.checkpoint import open_checkpoint
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
source = open_checkpoint(Path(sys.argv[1]))
hold = lambda done, total: done > total * 0.9 and (print(flush=True), input())
pack(source, Path(sys.argv[2]), make_plan(source), hold)
"""


def test_one_process_at_a_time_and_goes_on_after_a_kill(
    pristine: Path, pristine_packed: Path, destination: Path, partial: Path, journal: Path
) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, pristine, destination], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"\n"
        before = inodes(partial)
        with pytest.raises(Unavailable, match=f"another process is writing {destination}"):
            pack_model(pristine, destination)
        with pytest.raises(Unavailable, match="another process"), partial_directory(destination):
            pass
        assert inodes(partial) == before and not destination.exists()
    finally:
        other.kill()
        other.communicate()
    assert set(destination.parent.iterdir()) == {partial, journal}
    assert (partial / SECOND).exists(), "killed in the middle of a file"
    assert len(pack_all(pristine, destination)) == 1 + 8
    assert_packed(destination, pristine_packed)
    assert inodes(destination)[FIRST] == before[FIRST]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "redone"),
    [
        (lambda partial, journal: flip(partial / FIRST), 11),
        (lambda partial, journal: tear(partial / FIRST), 11),
        (lambda partial, journal: (partial / FIRST).unlink(), 11),
        (lambda partial, journal: (partial / SECOND).write_bytes(b"half"), 3),
        (lambda partial, journal: (partial / "packed.json").write_text("{}"), 3),
        (lambda partial, journal: tear(journal), 11),
        (lambda partial, journal: journal.write_bytes(journal.read_bytes() + b'{"name": "expe'), 3),
    ],
    ids=[
        "flipped bit", "cut short", "lost", "half written", "half a manifest", "torn entry", "torn next",
    ],
)  # fmt: skip
def test_what_is_not_whole_is_redone(
    pristine: Path,
    pristine_packed: Path,
    destination: Path,
    partial: Path,
    journal: Path,
    damage: Callable[[Path, Path], object],
    redone: int,
) -> None:
    """Interrupted twice: the journal of the second run must be as good as that of the first."""
    interrupted(pristine, destination, 9)
    damage(partial, journal)
    assert len(interrupted(pristine, destination, 11)) == 1 + redone
    assert len(pack_all(pristine, destination)) == 1 + 8
    assert_packed(destination, pristine_packed)


@pytest.mark.parametrize("lost", ["journal", "partial"])
def test_either_half_alone_is_worth_nothing(
    pristine: Path, pristine_packed: Path, destination: Path, partial: Path, journal: Path, lost: str
) -> None:
    interrupted(pristine, destination)
    journal.unlink() if lost == "journal" else shutil.rmtree(partial)
    assert pack_all(pristine, destination)[0] == 0
    assert_packed(destination, pristine_packed)


def test_another_plan_starts_anew(pristine: Path, destination: Path, tmp_path: Path) -> None:
    interrupted(pristine, destination)
    pack_model(pristine, destination, 5, 4)
    assert_packed(destination, pack_model(pristine, tmp_path / "expected", 5, 4).directory)


def test_another_codebook_starts_anew(pristine: Path, destination: Path, tmp_path: Path) -> None:
    """Files under two codebooks must not come together."""
    interrupted(pristine, destination)
    checkpoint = open_checkpoint(pristine)
    for path in (destination, tmp_path / "expected"):
        pack(checkpoint, path, make_plan(checkpoint), lambda *_: None, codebook=PUBLISHED)
    assert_packed(destination, tmp_path / "expected")


def test_a_changed_source_starts_anew(model: Path, destination: Path, tmp_path: Path) -> None:
    interrupted(model, destination)
    with edited_tensors(model / WEIGHTS) as tensors:
        tensors["lm_head.weight"] *= 2
    pack_model(model, destination)
    assert_packed(destination, pack_model(model, tmp_path / "expected").directory)


@pytest.mark.parametrize("what", ["common.checkpoint.packed_writer.VERSION", "importlib.metadata.version"])
def test_another_version_starts_anew(
    pristine: Path, pristine_packed: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    interrupted(pristine, destination)
    monkeypatch.setattr(what, "0" if what.endswith("VERSION") else lambda package: "0")
    assert pack_all(pristine, destination)[0] == 0
    assert_packed(destination, pristine_packed)


def test_bad_weights_leave_nothing(model: Path, destination: Path) -> None:
    """Also of what an earlier run finished."""
    with edited_tensors(model / WEIGHTS) as tensors:
        tensors["backbone.layers.3.mixer.experts.6.down_proj.weight"][7, 9] = float("nan")
    interrupted(model, destination, 9)
    with pytest.raises(CheckpointError, match=r"experts\.6\.down_proj\.weight: weights are not finite"):
        pack_model(model, destination)
    assert_nothing_left(destination)


@pytest.mark.parametrize(
    ("name", "experts", "read"),
    [(WEIGHTS, 3, AN_EXPERT), (WEIGHTS, 16, "it"), ("config.json", 3, "it"), ("config.json", 16, "it")],
    ids=["in the middle", "after the last read", "config in the middle", "config after the last read"],
)
def test_a_source_that_is_written_to_is_refused(
    model: Path, destination: Path, name: str, experts: int, read: str
) -> None:
    """With the name of the tensor that was being read, if one was."""
    with pytest.raises(CheckpointError, match=f"{model / name} changed while {read} was being read"):
        pack_until(model, destination, experts, lambda: os.utime(model / name, ns=(0, 0)))
    assert_nothing_left(destination)


@pytest.mark.parametrize("size", [0, 1_000_000])
def test_a_source_that_shrinks_is_refused(model: Path, destination: Path, size: int) -> None:
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} changed while {AN_EXPERT} was being read"):
        pack_until(model, destination, 3, lambda: os.truncate(model / WEIGHTS, size))
    assert_nothing_left(destination)


def test_a_source_that_disappears_is_refused(model: Path, destination: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} changed while {AN_EXPERT} was being read"):
        pack_until(model, destination, 3, (model / WEIGHTS).unlink)
    assert_nothing_left(destination)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the system refuse to grow any file beyond `size`, as a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_at_the_very_start_leaves_nothing(pristine: Path, destination: Path) -> None:
    with file_size_limit(500), pytest.raises(Exhausted, match=r"no room on the disk for config\.json, where"):
        pack_model(pristine, destination)
    assert_nothing_left(destination)


def test_a_full_disk_keeps_what_is_finished(
    pristine: Path, pristine_packed: Path, destination: Path, partial: Path
) -> None:
    """The limit comes down in the second layer's file, of which nothing stays."""
    with ExitStack() as stack, pytest.raises(Exhausted) as refusal:
        pack_until(pristine, destination, 11, lambda: stack.enter_context(file_size_limit(70_000)))
    for part in (
        f"no room on the disk for {SECOND}, where",
        "are needed",
        str(partial),
        "same command again",
    ):
        assert part in str(refusal.value)
    assert {path.name for path in partial.iterdir()} == {
        "config.json",
        "generation_config.json",
        DENSE,
        FIRST,
    }
    assert len(pack_all(pristine, destination)) == 1 + 8
    assert_packed(destination, pristine_packed)


def test_a_disk_that_is_too_small_is_refused_at_once(
    pristine: Path, pristine_packed: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing is said; and of a second run, only what the first has not written is asked for."""
    usage = shutil.disk_usage(destination.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=500_000))
    needed = sum(path.stat().st_size for path in pristine_packed.iterdir() if path.name != "packed.json")
    missing = f"so {(needed - 500_000) / 1000:.0f} kB are missing"
    with pytest.raises(Exhausted, match=f"500 kB are free and {needed / 1000:.0f} kB are needed, {missing}"):
        pack_model(pristine, destination)
    assert_nothing_left(destination)
    monkeypatch.undo()
    interrupted(pristine, destination)
    size = (pristine_packed / SECOND).stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(Exhausted, match=r"are missing; .* finished is kept"):
        pack_model(pristine, destination)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=size))
    assert len(pack_all(pristine, destination)) == 1 + 8


def test_a_failing_disk_keeps_what_is_finished(
    pristine: Path, pristine_packed: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        monkeypatch.setattr(os, "fsync", lambda descriptor: os.close(-1))

    with pytest.raises(CheckpointError, match=rf"cannot write .*{SECOND}.* finished is kept"):
        pack_until(pristine, destination, 16, fail)
    monkeypatch.undo()
    assert len(pack_all(pristine, destination)) == 1 + 8
    assert_packed(destination, pristine_packed)


def test_an_existing_destination_is_refused_and_left_alone(
    pristine: Path, destination: Path, partial: Path, journal: Path
) -> None:
    """And so is what an interrupted run left beside it."""
    interrupted(pristine, destination)
    destination.mkdir()
    (destination / "precious").touch()
    for existing in (destination, Path(), Path("/"), Path("..")):
        with pytest.raises(CheckpointError, match="exists already"):
            pack_model(pristine, existing)
    assert [path.name for path in destination.iterdir()] == ["precious"]
    assert set(destination.parent.iterdir()) == {destination, partial, journal}


def test_the_journal_says_what_is_finished(pristine: Path, destination: Path, journal: Path) -> None:
    interrupted(pristine, destination)
    key, *entries = map(json.loads, journal.read_text().splitlines())
    assert key.keys() == {"key"} and entries[-1]["name"] == FIRST
    for entry in entries:
        path = destination.with_name("packed.partial") / entry["name"]
        assert entry["bytes"] == path.stat().st_size
        assert entry["sha256"] == checksum.checksum(path, lambda _: None)


def fill_and_raise(directory: Path, error: BaseException) -> None:
    (directory / "file").touch()
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "full"), CheckpointError("damaged")])
def test_what_is_not_resumable_leaves_nothing(
    destination: Path, partial: Path, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    expected = {OSError: Exhausted}.get(type(error), type(error))
    with pytest.raises(expected), partial_directory(destination):
        fill_and_raise(partial, error)
    assert_nothing_left(destination)
    with caplog.at_level(logging.INFO), partial_directory(destination) as directory:
        (directory / "file").touch()
        assert not destination.exists()
    assert [path.name for path in destination.iterdir()] == ["file"] and not caplog.text
    assert list(destination.parent.iterdir()) == [destination]


def test_what_is_not_resumable_starts_from_nothing(pristine: Path, destination: Path) -> None:
    interrupted(pristine, destination)
    with partial_directory(destination) as directory:
        assert list(directory.iterdir()) == []
    assert list(destination.parent.iterdir()) == [destination]
