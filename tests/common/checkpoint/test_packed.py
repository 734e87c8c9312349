"""The packed checkpoint: what is on disk is what was packed, bit for bit."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoint import HuggingFaceCheckpoint, PackedCheckpoint, is_packed, open_checkpoint
from common.checkpoint.manifest import MANIFEST
from common.checkpoint.source import Matrix, WeightSource
from common.expert_key import ExpertKey
from common.hlwq.codebook import packing_codebook
from common.hlwq.quantize import pack_matrix
from common.record import ExpertBits
from tests.helpers.models import edited_tensors, make_hf_model, pack_model, random_model

DENSE, EXPERTS = "dense.safetensors", "experts-00001.safetensors"


def read_record(checkpoint: PackedCheckpoint, key: ExpertKey) -> torch.Tensor:
    """One record by a plain read at its place, as the arena is filled."""
    path, offset = checkpoint.records_file(key.layer)
    stride = checkpoint.layout.stride
    with path.open("rb") as file:
        content = os.pread(file.fileno(), stride, offset + key.expert * stride)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@pytest.mark.parametrize(("up_bits", "down_bits"), [(5, 5), (3, 4), (16, 6), (6, 2)])
def test_records_are_the_packed_weights_bit_for_bit(
    pristine: Path, tmp_path: Path, up_bits: int, down_bits: int
) -> None:
    checkpoint = pack_model(pristine, tmp_path / "packed", up_bits, down_bits)
    source = HuggingFaceCheckpoint.open(pristine)
    assert checkpoint.layout.bits == (ExpertBits(up_bits, down_bits),) * 2
    for key in (ExpertKey(0, 0), ExpertKey(0, 7), ExpertKey(1, 3)):
        expected = torch.zeros(checkpoint.layout.stride, dtype=torch.uint8)
        for matrix, weight in zip(checkpoint.layout[key.layer].matrices, source.expert(key), strict=True):
            codebook = None if matrix.bits == 16 else packing_codebook(matrix.bits)
            matrix.store(pack_matrix(weight, matrix.bits, codebook, fit_norms=True), expected)
        assert torch.equal(read_record(checkpoint, key), expected)


def test_sixteen_bits_are_lossless(pristine: Path, tmp_path: Path) -> None:
    checkpoint = pack_model(pristine, tmp_path / "packed", 16, 16)
    source = HuggingFaceCheckpoint.open(pristine)
    assert checkpoint.manifest.codebook == "none"
    for layer in range(2):
        for expert in range(8):
            key = ExpertKey(layer, expert)
            record = read_record(checkpoint, key)
            for matrix, weight in zip(checkpoint.layout[layer].matrices, source.expert(key), strict=True):
                assert torch.equal(matrix.view(record).decode(torch.bfloat16), weight)


def dense_of(source: WeightSource) -> dict[str, Matrix]:
    return {name: source.dense_matrix(name) for name in source.dense_stored}


def test_dense_weights_come_back(pristine: Path, pristine_packed: Path) -> None:
    dense, expected = (dense_of(open_checkpoint(path)) for path in (pristine_packed, pristine))
    assert dense.keys() == expected.keys()
    for name, tensor in expected.items():
        assert dense[name].dtype == tensor.dtype and torch.equal(dense[name], tensor)


def test_dense_weights_keep_their_dtypes(model: Path, tmp_path: Path) -> None:
    """Published checkpoints mix them: most bfloat16, the router's correction float32."""
    bias = "backbone.layers.1.mixer.gate.e_score_correction_bias"
    with edited_tensors(model / "model.safetensors") as tensors:
        tensors[bias] = torch.rand(8)
        tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"].half()
        expected = dict(tensors)
    dense = dense_of(pack_model(model, tmp_path / "packed"))
    for name in (bias, "backbone.norm_f.weight", "lm_head.weight"):
        assert dense[name].dtype == expected[name].dtype and torch.equal(dense[name], expected[name])


def test_dense_weights_are_aligned(tmp_path: Path) -> None:
    """A float32 tensor begins at a multiple of 4 bytes, even after bfloat16 tensors of odd length."""
    make_hf_model(tmp_path / "model", mamba_num_heads=3, n_groups=1)
    with edited_tensors(tmp_path / "model" / "model.safetensors") as tensors:
        tensors |= {name: tensor.float() for name, tensor in tensors.items() if name.endswith("mixer.D")}
    dense = dense_of(pack_model(tmp_path / "model", tmp_path / "packed"))
    assert {tensor.dtype for tensor in dense.values()} == {torch.bfloat16, torch.float32}
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in dense.values())


def test_form_on_disk(pristine_packed: Path) -> None:
    """Plain safetensors files, records at a multiple of 4096, the source's small files beside them."""
    checkpoint = PackedCheckpoint.open(pristine_packed)
    for layer in range(2):
        path, offset = checkpoint.records_file(layer)
        assert offset % 4096 == 0 and path.stat().st_size == offset + 8 * checkpoint.layout.stride
        records = load_file(path)
        assert list(records) == ["records"] and records["records"].shape == (8, checkpoint.layout.stride)
        assert torch.equal(records["records"][5], read_record(checkpoint, ExpertKey(layer, 5)))
    names = {path.name for path in pristine_packed.iterdir()}
    small = {"config.json", "generation_config.json", MANIFEST}
    assert names == small | {DENSE, "experts-00000.safetensors", EXPERTS}
    assert checkpoint.num_experts == 16 and checkpoint.fingerprint == checkpoint.manifest.fingerprint


def test_packing_is_deterministic(pristine: Path, pristine_packed: Path, tmp_path: Path) -> None:
    again = pack_model(pristine, tmp_path / "again")
    for path in pristine_packed.iterdir():
        assert path.read_bytes() == (again.directory / path.name).read_bytes(), path.name


def test_fingerprint_is_of_values_not_of_their_storage(pristine_packed: Path, tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path / "stacked", save_original_format=False)
    stacked = pack_model(tmp_path / "stacked", tmp_path / "packed")
    assert stacked.fingerprint == PackedCheckpoint.open(pristine_packed).fingerprint
    random_model(seed=1).save_pretrained(tmp_path / "other")
    assert pack_model(tmp_path / "other", tmp_path / "packed-other").fingerprint != stacked.fingerprint


def test_kinds_are_told_apart(pristine: Path, pristine_packed: Path) -> None:
    assert is_packed(pristine_packed) and not is_packed(pristine)
    assert isinstance(open_checkpoint(pristine_packed), PackedCheckpoint)
    assert isinstance(open_checkpoint(pristine), HuggingFaceCheckpoint)
