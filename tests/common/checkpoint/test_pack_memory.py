"""Packing in bounded memory: the resident set is measured, mapped pages included, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoint import PackedCheckpoint, open_checkpoint, packing
from common.checkpoint.names import dense_shapes, expert_names, expert_shapes
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.checkpoint.tensor_file import TensorInfo, header
from common.expert_key import ExpertKey
from common.hlwq import native
from common.hlwq.matrix import PackedMatrix
from common.hlwq.quantize import pack_matrix
from common.model_config import ModelConfig
from tests.helpers.models import edited_tensors, tiny_config

MEGABYTE = 1 << 20

PACK = """
import sys
from pathlib import Path
import torch
from common.checkpoint import open_checkpoint
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.hlwq.calibrated import Moment

torch.set_num_threads(2)  # each has experts of its own in flight

def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

class RandomInputs:
    identity = "random"

    def expert(self, key, up):
        return tuple(Moment.of(torch.randn(64, columns)) for columns in reversed(up.shape))

source, plan = open_checkpoint(Path(sys.argv[1])), sys.argv[3]
inputs = RandomInputs() if plan == "calibrated" else None
plan = make_plan(source, bits=5 if inputs else int(plan))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
pack(source, Path(sys.argv[2]), plan, lambda *_: None, calibration=inputs)
print(peak() - before)
"""


def sparse_model(directory: Path, pattern: str = "EE", **shape: int) -> Path:
    """A model of zeros that takes no room on the disk."""
    directory.mkdir()
    raw = tiny_config(hybrid_override_pattern=pattern, **shape)
    (directory / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_dict(raw)
    shapes = dense_shapes(config)
    for layer in range(config.num_layers):
        for expert in range(config.n_routed_experts):
            names = expert_names(config, ExpertKey(layer, expert))
            shapes.update(zip(names, expert_shapes(config), strict=True))
    head = header({name: TensorInfo("BF16", shape) for name, shape in shapes.items()})
    with (directory / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(TensorInfo("BF16", shape).size for shape in shapes.values()))
    return directory


def growth(source: Path, destination: Path, how: str = "16") -> int:
    """By how much the resident set of a process grows at most while it packs: at bits, or "calibrated"."""
    command = [sys.executable, "-c", PACK, str(source), str(destination), how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_the_source_may_be_many_times_larger_than_what_packing_takes(tmp_path: Path) -> None:
    """Of 256 MB of experts, 2 MB each, only a few exist at any time; read pages are not kept mapped."""
    shape = {"hidden_size": 512, "moe_intermediate_size": 1024, "n_routed_experts": 64}
    source = sparse_model(tmp_path / "source", **shape)
    assert open_checkpoint(source).routed_bytes == 256 * MEGABYTE
    assert growth(source, tmp_path / "packed") < 64 * MEGABYTE


def test_so_it_may_when_it_is_quantized(tmp_path: Path) -> None:
    """Neither the 64 MB of experts are kept nor the 20 MB that they become."""
    shape = {"hidden_size": 512, "moe_intermediate_size": 1024, "n_routed_experts": 16}
    source = sparse_model(tmp_path / "source", **shape)
    assert open_checkpoint(source).routed_bytes == 64 * MEGABYTE
    limit = 40 if native.path() != native.PLAIN else 64  # the twins in PyTorch keep more at once
    assert growth(source, tmp_path / "packed", "5") < limit * MEGABYTE


def test_calibration_takes_what_a_few_matrices_need(tmp_path: Path) -> None:
    """At half the widths of the 30B: two threads, each with the moments of one expert and their factors."""
    shape = {"hidden_size": 1344, "moe_intermediate_size": 928, "n_routed_experts": 2}
    source = sparse_model(tmp_path / "source", "E", **shape)
    assert growth(source, tmp_path / "packed", "calibrated") < 192 * MEGABYTE


def test_dense_weights_are_in_memory_one_at_a_time(tmp_path: Path) -> None:
    source = sparse_model(tmp_path / "source", hidden_size=1024, vocab_size=48 << 10)
    sizes = sorted(stored.size for stored in open_checkpoint(source).dense_stored.values())
    assert sizes[-2:] == [96 * MEGABYTE] * 2, "embeddings and lm_head"
    assert growth(source, tmp_path / "packed") < (96 + 32) * MEGABYTE


def test_large_matrices_are_packed_by_rows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantizing takes many times the memory of what it is given; the result is that of the whole matrix."""
    monkeypatch.setattr(packing, "_WEIGHTS_AT_ONCE", 5 * 128 + 7)
    given: list[torch.Tensor] = []

    def recording(weight: torch.Tensor, *options: object, **named: object) -> PackedMatrix:
        given.append(weight)
        return pack_matrix(weight, *options, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "pack_matrix", recording)
    with edited_tensors(model / "model.safetensors") as tensors:
        whole = pack_matrix(tensors["lm_head.weight"], 5, packing.packing_codebook(5), fit_norms=True)
    source = open_checkpoint(model)
    packed = pack(source, tmp_path / "packed", make_plan(source, dense_bits=5), lambda *_: None)
    assert max(weight.numel() for weight in given) == 5 * 128
    assert_identical(PackedCheckpoint.open(packed.directory).dense_matrix("lm_head.weight"), whole)


def assert_identical(got: object, expected: PackedMatrix) -> None:
    assert isinstance(got, PackedMatrix)
    assert all(map(torch.equal, got.planes, expected.planes))
    for part in ("norms", "codebook"):
        assert torch.equal(getattr(got, part), getattr(expected, part))
