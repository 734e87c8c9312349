"""Packing appears whole or not at all, in order, in bounded memory; what cannot be packed leaves nothing."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.checkpoint import HuggingFaceCheckpoint, PackedCheckpoint, packing
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.errors import CheckpointError, ConfigError
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


@pytest.mark.parametrize("records", [1, 16], ids=["abandoned", "exhausted"])
def test_torch_gets_its_threads_back(pristine: Path, records: int) -> None:
    source = HuggingFaceCheckpoint.open(pristine)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with closing(
            packing.packed_records(source, five_bits(source), None, packing.CONVERGED, KEYS)
        ) as made:
            assert len(list(islice(made, records))) == records
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_refuses_a_destination_without_a_parent(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        pack_model(pristine, tmp_path / "absent" / "packed")


def test_progress_counts_the_bytes_of_all_weights(pristine: Path, destination: Path) -> None:
    reports: list[tuple[int, int]] = []
    source = HuggingFaceCheckpoint.open(pristine)
    pack(source, destination, make_plan(source, dense_bits=4), lambda *report: reports.append(report), "tiny")
    total = sum(tensor.nbytes for tensor in load_file(pristine / "model.safetensors").values())
    assert reports[0] == (0, total) and reports[-1] == (total, total) and reports == sorted(reports)
    assert len(reports) > 16 + len(source.dense_stored) and {every for _, every in reports} == {total}
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
    with closing(packing.packed_records(source, five_bits(source), None, packing.CONVERGED, KEYS)) as records:
        for taken, _ in enumerate(records, 1):
            assert len(made) == min(16, taken + ahead)


def test_many_threads_share_the_memory(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Counting(ThreadPoolExecutor):
        def __init__(self, threads: int, name: str) -> None:
            asked.append(threads)
            super().__init__(threads, name)

    monkeypatch.setattr(packing, "ThreadPoolExecutor", Counting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    source = HuggingFaceCheckpoint.open(pristine)
    assert len(list(packing.packed_records(source, five_bits(source), None, packing.CONVERGED, KEYS))) == 16
    assert len(list(packing.in_order([int] * 3))) == 3
    assert asked == [21, 21]
