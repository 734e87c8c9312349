"""Packing appears whole or not at all: whatever fails, nothing is left and nothing was ever half visible."""

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint import HuggingFaceCheckpoint, PackedCheckpoint, packing
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.errors import CheckpointError, ConfigError, Exhausted
from common.expert_key import ExpertKey
from common.record import ExpertBits, RecordLayouts, record_layouts
from tests.helpers.models import edited_tensors, pack_model

KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(8)]
DOWN_6 = "backbone.layers.3.mixer.experts.6.down_proj.weight"


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    """Where to pack: alone in its directory, so that leftovers are easy to see."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "packed"


def five_bits(source: HuggingFaceCheckpoint) -> RecordLayouts:
    return record_layouts(source.config, [ExpertBits(5, 5)] * 2)


def assert_nothing_left(destination: Path) -> None:
    assert list(destination.parent.iterdir()) == []


@pytest.mark.parametrize("name", [DOWN_6, "backbone.layers.0.mixer.in_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [5, 16])
def test_refuses_weights_that_are_not_finite(
    model: Path, destination: Path, name: str, value: float, bits: int
) -> None:
    with edited_tensors(model / "model.safetensors") as tensors:
        tensors[name][7, 9] = value
    with pytest.raises(CheckpointError, match=f"{name}: weights are not finite"):
        pack_model(model, destination, bits, bits)
    assert_nothing_left(destination)


def test_names_a_stacked_expert_as_published(model: Path, destination: Path) -> None:
    with edited_tensors(model / "model.safetensors") as tensors:
        prefix = "backbone.layers.3.mixer.experts."
        for matrix in ("up_proj", "down_proj"):
            experts = [tensors.pop(f"{prefix}{expert}.{matrix}.weight") for expert in range(8)]
            tensors[prefix + matrix] = torch.stack(experts)
        tensors[prefix + "down_proj"][6, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=DOWN_6):
        pack_model(model, destination)


def test_refuses_unknown_bits(pristine: Path, destination: Path) -> None:
    with pytest.raises(ConfigError, match="bits 7"):
        pack_model(pristine, destination, 7, 5)
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


@pytest.mark.parametrize("size", [1000, 100_000], ids=["in the config", "in the dense weights"])
def test_disk_full_while_packing(pristine: Path, destination: Path, size: int) -> None:
    with file_size_limit(size), pytest.raises(Exhausted, match="no room on the disk"):
        pack_model(pristine, destination)
    assert_nothing_left(destination)


def test_disk_full_in_the_records(pristine: Path, destination: Path) -> None:
    """The limit comes down when dense weights are written and three experts are packed."""
    source = HuggingFaceCheckpoint.open(pristine)
    stack = ExitStack()

    def limit(done: int, total: int) -> None:
        if done == 3:
            stack.enter_context(file_size_limit(70_000))

    with stack, pytest.raises(Exhausted, match="no room on the disk"):
        pack(source, destination, make_plan(source), limit)
    assert_nothing_left(destination)


def test_refuses_at_once_when_the_disk_is_too_small(
    pristine: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(destination.parent)._replace(free=500_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(Exhausted, match="500 kB are free"):
        pack_model(pristine, destination)


def test_an_interrupt_leaves_nothing(pristine: Path, destination: Path) -> None:
    seen: list[list[str]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append([path.name.split("-")[0] for path in destination.parent.iterdir()])
        if done == 10:
            raise KeyboardInterrupt

    source = HuggingFaceCheckpoint.open(pristine)
    with pytest.raises(KeyboardInterrupt):
        pack(source, destination, make_plan(source), interrupt)
    assert seen == [["packed.partial"]] * 10, "the destination must not show before it is complete"
    assert_nothing_left(destination)


@pytest.mark.parametrize("records", [1, 16], ids=["abandoned", "exhausted"])
def test_torch_gets_its_threads_back(pristine: Path, records: int) -> None:
    source = HuggingFaceCheckpoint.open(pristine)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with closing(packing.packed_records(source, five_bits(source), KEYS)) as made:
            assert len(list(islice(made, records))) == records
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_refuses_an_existing_destination(pristine: Path, destination: Path) -> None:
    destination.mkdir()
    (destination / "precious").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        pack_model(pristine, destination)
    assert [path.name for path in destination.iterdir()] == ["precious"]
    assert list(destination.parent.iterdir()) == [destination]


def test_refuses_a_destination_without_a_parent(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        pack_model(pristine, tmp_path / "absent" / "packed")


def test_removes_what_a_killed_process_left(pristine: Path, destination: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    leftovers = {
        process.pid: destination.with_name(f"packed.partial-{process.pid}") for process in (killed, living)
    }
    for leftover in leftovers.values():
        leftover.mkdir()
        (leftover / "dense.safetensors").touch()
    others = {destination.with_name(f"other.partial-{killed.pid}"), destination.with_name(str(killed.pid))}
    for other in others:
        other.mkdir()
    try:
        killed.kill()
        killed.communicate()
        pack_model(pristine, destination)
        assert set(destination.parent.iterdir()) == {destination, leftovers[living.pid], *others}
    finally:
        living.communicate(b"\n")


def test_progress_counts_experts(pristine: Path, destination: Path) -> None:
    reports: list[tuple[int, int]] = []
    source = HuggingFaceCheckpoint.open(pristine)
    pack(source, destination, make_plan(source), lambda *report: reports.append(report), "tiny")
    assert reports == [(done, 16) for done in range(1, 17)]
    assert PackedCheckpoint.open(destination).manifest.source["name"] == "tiny"


def test_carries_tokenizer_and_chat_template(model: Path, destination: Path) -> None:
    carried = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{ }",
        "chat_template.jinja": "{{ messages }}",
    }
    for name, content in (carried | {"notes.txt": "", "modeling.py": ""}).items():
        (model / name).write_text(content)
    pack_model(model, destination)
    for name, content in carried.items():
        assert (destination / name).read_text() == content
    assert not (destination / "notes.txt").exists() and not (destination / "modeling.py").exists()


def test_only_a_few_records_exist_at_any_time(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With threads that do everything at once, what has been asked of them is what exists."""
    made: list[Future[Tensor]] = []

    class Eager(ThreadPoolExecutor):
        def submit(self, *call: Any, **options: Any) -> Future[Any]:
            made.append(super().submit(*call, **options))
            wait(made)
            return made[-1]

    monkeypatch.setattr(packing, "ThreadPoolExecutor", Eager)
    source = HuggingFaceCheckpoint.open(pristine)
    ahead = 2 * torch.get_num_threads()
    with closing(packing.packed_records(source, five_bits(source), KEYS)) as records:
        for taken, _ in enumerate(records, 1):
            assert len(made) == min(16, taken + ahead)
