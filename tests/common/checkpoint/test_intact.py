"""Damage that only a checksum can tell: nothing is made of a checkpoint that is not what was packed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from common.checkpoint import open_checkpoint
from common.checkpoint.packed import DENSE, PackedCheckpoint, layer_file
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.checkpoint.unpacking import unpack
from common.errors import CheckpointError

MAKERS: dict[str, Callable[[PackedCheckpoint, Path], object]] = {
    "packed": lambda source, made: pack(source, made, make_plan(source), lambda *_: None),
    "packed at 4 bits": lambda source, made: pack(source, made, make_plan(source, 4), lambda *_: None),
    "plain": lambda source, made: unpack(source, made, "bf16", lambda *_: None),
    "published": lambda source, made: unpack(source, made, "polar_engine_v5", lambda *_: None),
}


def flip(path: Path, offset: int) -> None:
    """Flip one bit, and let neither size nor codebooks nor norms show it."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_flipped_bit_of_a_code_is_not_carried_over(
    packed: Path, tmp_path: Path, make: Callable[[PackedCheckpoint, Path], object]
) -> None:
    source = PackedCheckpoint.open(packed)
    path, offset = source.records_file(1)
    flip(path, offset + 5 * source.layout.stride)
    (tmp_path / "made").mkdir()
    with pytest.raises(CheckpointError, match=f"^{packed}: {layer_file(1)} differs from its checksum"):
        make(PackedCheckpoint.open(packed), tmp_path / "made" / "result")
    assert list((tmp_path / "made").iterdir()) == []


def test_every_damaged_file_is_named(packed: Path, tmp_path: Path) -> None:
    for name in (DENSE, layer_file(0)):
        flip(packed / name, (packed / name).stat().st_size - 2)
    with pytest.raises(CheckpointError, match=rf"{DENSE} differs .*, {layer_file(0)} differs"):
        MAKERS["plain"](PackedCheckpoint.open(packed), tmp_path / "plain")


def test_other_refusals_do_not_wait_for_checksums(
    packed: Path, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(path: Path, count: Callable[[int], None]) -> str:
        while True:
            count(0)

    monkeypatch.setattr("common.checkpoint.manifest.checksum", endless)
    (tmp_path / "there").mkdir()
    for make in MAKERS.values():
        with pytest.raises(CheckpointError, match="exists already"):
            make(PackedCheckpoint.open(packed), tmp_path / "there")
    unpack(open_checkpoint(pristine), tmp_path / "plain", "bf16", lambda *_: None)  # which has none
