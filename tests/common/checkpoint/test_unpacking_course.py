"""How unpacking proceeds: whole or not at all, a few weights at a time, and counted."""

import os
import shutil
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoint import open_checkpoint
from common.checkpoint.packed import layer_file
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.checkpoint.source import Matrix
from common.checkpoint.unpacking import unpack
from common.errors import CheckpointError, ConfigError, Exhausted
from common.expert_key import ExpertKey
from tests.helpers.full_disk import file_size_limit
from tests.helpers.models import unpack_model

WEIGHTS = "model.safetensors"
UP_0 = "backbone.layers.1.mixer.experts.0.up_proj"


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    """Where to unpack: alone in its directory, so that leftovers are easy to see."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "plain"


def assert_nothing_left(destination: Path) -> None:
    assert list(destination.parent.iterdir()) == []


def test_hlwq_q5_refuses_own_packs_by_name(pristine_packed: Path, destination: Path) -> None:
    with pytest.raises(ConfigError, match=rf"tiny-q5: {UP_0}\.weight has a codebook of its own"):
        unpack_model(pristine_packed, destination, "hlwq-q5")
    assert_nothing_left(destination)


def test_hlwq_q5_refuses_other_bits_before_it_writes(
    pristine: Path, tmp_path: Path, destination: Path
) -> None:
    checkpoint = open_checkpoint(pristine)
    plan = make_plan(checkpoint, dense_bits=6)
    source = pack(checkpoint, tmp_path / "packed", plan, lambda *_: None)
    with pytest.raises(
        ConfigError,
        match=r"packed: backbone\.layers\.0\.mixer\.in_proj\.weight has codes of 6 bits.*polar_engine_v5",
    ):
        unpack(source, destination, "hlwq-q5", lambda *_: pytest.fail("it has begun"))
    assert_nothing_left(destination)


def test_only_a_few_weights_exist_at_any_time(pristine_packed: Path, destination: Path) -> None:
    """Torch has one thread here, and so has unpacking: one weight, and what runs ahead of the progress."""
    source = open_checkpoint(pristine_packed)
    alive: weakref.WeakSet[Matrix] = weakref.WeakSet()
    most: list[int] = []

    def watched(read: Callable[..., tuple[Matrix, ...]]) -> Callable[..., tuple[Matrix, ...]]:
        def watching(key: ExpertKey) -> tuple[Matrix, ...]:
            matrices = read(key)
            alive.update(matrices)
            most.append(len(alive))
            return matrices

        return watching

    source.expert = watched(source.expert)  # type: ignore[assignment]
    unpack(source, destination, "bf16", lambda *_: None)
    assert len(most) == 16 and max(most) <= 2 * (torch.get_num_threads() + 1)


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize(("name", "read"), [(WEIGHTS, "backbone.embeddings.weight"), ("config.json", "it")])
def test_a_source_that_changes_while_it_is_read(model: Path, destination: Path, name: str, read: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} changed while {read} was being read"):
        unpack(open_checkpoint(model), destination, "bf16", lambda *_: touch(model / name))
    assert_nothing_left(destination)


def test_a_packed_source_that_changes_while_it_is_read(packed: Path, destination: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{layer_file(0)} changed while records was being read"):
        unpack(open_checkpoint(packed), destination, "bf16", lambda *_: touch(packed / layer_file(0)))
    assert_nothing_left(destination)


@pytest.mark.parametrize(("share", "size", "name"), [(0, 100, "config.json"), (0.5, 70_000, WEIGHTS)])
def test_disk_full(pristine_packed: Path, destination: Path, share: float, size: int, name: str) -> None:
    """At the start and in the middle; the file that does not fit is named."""
    stack = ExitStack()

    def limit(done: int, total: int) -> None:
        if done >= share * total:
            stack.enter_context(file_size_limit(size))

    with stack, pytest.raises(Exhausted, match=f"no room on the disk for {name}$"):
        unpack(open_checkpoint(pristine_packed), destination, "bf16", limit)
    assert_nothing_left(destination)


def test_refuses_at_once_when_the_disk_is_too_small(
    pristine_packed: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(destination.parent)._replace(free=500_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(Exhausted, match="500 kB are free"):
        unpack(open_checkpoint(pristine_packed), destination, "bf16", lambda *_: pytest.fail("it has begun"))
    assert_nothing_left(destination)


def test_an_interrupt_leaves_nothing(pristine_packed: Path, destination: Path) -> None:
    seen: list[bool] = []

    def interrupt(done: int, total: int) -> None:
        seen.append(destination.exists())
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(open_checkpoint(pristine_packed), destination, "bf16", interrupt)
    assert len(seen) > 1 and not any(seen), "the destination must not show before it is complete"
    assert_nothing_left(destination)


def test_refuses_an_existing_destination(pristine_packed: Path, destination: Path) -> None:
    destination.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        unpack_model(pristine_packed, destination)
    assert list(destination.parent.iterdir()) == [destination]


def test_progress_counts_bytes(pristine_packed: Path, destination: Path) -> None:
    reports: list[tuple[int, int]] = []
    unpack(open_checkpoint(pristine_packed), destination, "bf16", lambda *report: reports.append(report))
    total = sum(tensor.nbytes for tensor in load_file(destination / WEIGHTS).values())
    assert (reports[0], reports[-1]) == ((0, total), (total, total)) and {
        report[1] for report in reports
    } == {total}
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
