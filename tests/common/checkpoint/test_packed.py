"""The packed checkpoint: what is on disk is what was packed, bit for bit, and every damage is found."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import HuggingFaceCheckpoint, PackedCheckpoint, is_packed, open_checkpoint
from common.checkpoint.checksum import FileEntry, checksum
from common.checkpoint.manifest import MANIFEST, Manifest
from common.errors import CheckpointError, ConfigError
from common.expert_key import ExpertKey
from common.hlwq.codebook import converged_codebook
from common.hlwq.quantize import pack_matrix
from tests.helpers.models import edited_json, edited_tensors, make_hf_model, pack_model, random_model

DENSE, EXPERTS = "dense.safetensors", "experts-00001.safetensors"


def read_record(checkpoint: PackedCheckpoint, key: ExpertKey) -> torch.Tensor:
    """One record by a plain read at its place, as the arena is filled."""
    path, offset = checkpoint.records_file(key.layer)
    stride = checkpoint.layout.stride
    with path.open("rb") as file:
        content = os.pread(file.fileno(), stride, offset + key.expert * stride)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def reseal(directory: Path) -> None:
    """Make the manifest agree with changed files, so that only the check of their contents is left."""
    with edited_json(directory / MANIFEST) as raw:
        raw["files"] = {
            name: {
                "bytes": (directory / name).stat().st_size,
                "sha256": checksum(directory / name, lambda _: None),
            }
            for name in raw["files"]
        }
        raw["fingerprint"] = fingerprint(raw)


def fingerprint(raw: dict) -> str:
    entries = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
    return Manifest(5, 5, 0, "", 0, 0, "", {}, entries).fingerprint


@pytest.mark.parametrize(("up_bits", "down_bits"), [(5, 5), (3, 4), (16, 6), (6, 2)])
def test_records_are_the_packed_weights_bit_for_bit(
    pristine: Path, tmp_path: Path, up_bits: int, down_bits: int
) -> None:
    checkpoint = pack_model(pristine, tmp_path / "packed", up_bits, down_bits)
    source = HuggingFaceCheckpoint.open(pristine)
    layout = checkpoint.layout
    assert (layout.up.bits, layout.down.bits) == (up_bits, down_bits)
    for key in (ExpertKey(0, 0), ExpertKey(0, 7), ExpertKey(1, 3)):
        expected = torch.zeros(layout.stride, dtype=torch.uint8)
        for matrix, weight in zip(layout.matrices, source.expert(key), strict=True):
            codebook = None if matrix.bits == 16 else converged_codebook(matrix.bits)
            matrix.store(pack_matrix(weight, matrix.bits, codebook), expected)
        assert torch.equal(read_record(checkpoint, key), expected)


def test_sixteen_bits_are_lossless(pristine: Path, tmp_path: Path) -> None:
    checkpoint = pack_model(pristine, tmp_path / "packed", 16, 16)
    source = HuggingFaceCheckpoint.open(pristine)
    assert checkpoint.codebooks() == {"up_proj": None, "down_proj": None}
    assert checkpoint.manifest.codebook == "none"
    for layer in range(2):
        for expert in range(8):
            key = ExpertKey(layer, expert)
            record = read_record(checkpoint, key)
            for matrix, weight in zip(checkpoint.layout.matrices, source.expert(key), strict=True):
                assert torch.equal(matrix.view(record).decode(None, torch.bfloat16), weight)


def test_dense_weights_and_codebooks_come_back(pristine: Path, pristine_packed: Path) -> None:
    checkpoint = PackedCheckpoint.open(pristine_packed)
    dense, expected = checkpoint.dense(), dict(HuggingFaceCheckpoint.open(pristine).dense())
    assert dense.keys() == expected.keys()
    for name, tensor in expected.items():
        assert dense[name].dtype == tensor.dtype and torch.equal(dense[name], tensor)
    for codebook in checkpoint.codebooks().values():
        assert codebook is not None and torch.equal(codebook, converged_codebook(5).expand(2, -1))


def test_dense_weights_keep_their_dtypes(model: Path, tmp_path: Path) -> None:
    """Published checkpoints mix them: most bfloat16, the router's correction float32."""
    bias = "backbone.layers.1.mixer.gate.e_score_correction_bias"
    with edited_tensors(model / "model.safetensors") as tensors:
        tensors[bias] = torch.rand(8)
        tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"].half()
        expected = dict(tensors)
    dense = pack_model(model, tmp_path / "packed").dense()
    for name in (bias, "backbone.norm_f.weight", "lm_head.weight"):
        assert dense[name].dtype == expected[name].dtype and torch.equal(dense[name], expected[name])


def test_dense_weights_are_aligned(tmp_path: Path) -> None:
    """A float32 tensor begins at a multiple of 4 bytes, even after bfloat16 tensors of odd length."""
    make_hf_model(tmp_path / "model", mamba_num_heads=3, n_groups=1)
    with edited_tensors(tmp_path / "model" / "model.safetensors") as tensors:
        tensors |= {name: tensor.float() for name, tensor in tensors.items() if name.endswith("mixer.D")}
    dense = pack_model(tmp_path / "model", tmp_path / "packed").dense()
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


def set_in_manifest(**changes: object) -> Callable[[Path], None]:
    def damage(packed: Path) -> None:
        with edited_json(packed / MANIFEST) as raw:
            raw.update(changes)

    return damage


def write_manifest(content: str) -> Callable[[Path], None]:
    return lambda packed: (packed / MANIFEST).write_text(content) and None


def unlist_layer(packed: Path) -> None:
    with edited_json(packed / MANIFEST) as raw:
        del raw["files"][EXPERTS]
        raw["fingerprint"] = fingerprint(raw)


def forge_checksum(packed: Path) -> None:
    with edited_json(packed / MANIFEST) as raw:
        raw["files"][EXPERTS]["sha256"] = "0" * 64


def remove_layer(packed: Path) -> None:
    (packed / EXPERTS).unlink()


def truncate_layer(packed: Path) -> None:
    os.truncate(packed / EXPERTS, (packed / EXPERTS).stat().st_size - 4096)


def truncate_layer_and_reseal(packed: Path) -> None:
    truncate_layer(packed)
    reseal(packed)


def drop_an_expert(packed: Path) -> None:
    records = load_file(packed / EXPERTS)["records"]
    save_file({"records": records[:7].contiguous()}, packed / EXPERTS)
    reseal(packed)


def rewrite_unaligned(packed: Path) -> None:
    save_file(load_file(packed / EXPERTS), packed / EXPERTS)
    reseal(packed)


def shorten_codebook(packed: Path) -> None:
    with edited_tensors(packed / DENSE) as tensors:
        tensors["hlwq.codebooks.down_proj"] = tensors["hlwq.codebooks.down_proj"][:, :31].contiguous()
    reseal(packed)


def drop_codebook(packed: Path) -> None:
    with edited_tensors(packed / DENSE) as tensors:
        del tensors["hlwq.codebooks.up_proj"]
    reseal(packed)


def drop_dense(packed: Path) -> None:
    with edited_tensors(packed / DENSE) as tensors:
        del tensors["lm_head.weight"]
    reseal(packed)


def widen_experts_in_config(packed: Path) -> None:
    with edited_json(packed / "config.json") as config:
        config["moe_intermediate_size"] = 73
    reseal(packed)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (set_in_manifest(version=2), "version 2.*reads version 1.*newer expert-serving"),
        (set_in_manifest(format="other"), "not the manifest of a packed checkpoint"),
        (set_in_manifest(layout="0" * 32), "another layout"),
        (set_in_manifest(down_bits=4), "another layout"),
        (set_in_manifest(stride="wide"), "damaged.*stride"),
        (set_in_manifest(files={}), "fingerprint"),
        (write_manifest("{"), "damaged"),
        (write_manifest("[]"), "damaged"),
        (unlist_layer, f"does not list {EXPERTS}"),
        (forge_checksum, "fingerprint"),
        (remove_layer, f"{EXPERTS} is missing"),
        (truncate_layer, f"{EXPERTS} has .* bytes instead of"),
        (truncate_layer_and_reseal, f"{EXPERTS} is truncated"),
        (drop_an_expert, f"{EXPERTS}: records has shape"),
        (rewrite_unaligned, f"{EXPERTS}.*multiple of 4096"),
        (shorten_codebook, r"codebooks\.down_proj has shape \[2, 31\].*\[2, 32\]"),
        (drop_codebook, r"lacks tensor 'hlwq\.codebooks\.up_proj'"),
        (drop_dense, "lacks tensor 'lm_head.weight'"),
        (widen_experts_in_config, "another layout"),
    ],
    ids=lambda value: getattr(value, "__name__", "-"),
)
def test_refuses_what_does_not_fit(packed: Path, damage: Callable[[Path], None], complaint: str) -> None:
    PackedCheckpoint.open(packed)
    damage(packed)
    with pytest.raises(CheckpointError, match=complaint):
        PackedCheckpoint.open(packed)


def test_refuses_bits_that_records_cannot_have(packed: Path) -> None:
    set_in_manifest(up_bits=7)(packed)
    with pytest.raises(ConfigError, match="bits 7"):
        PackedCheckpoint.open(packed)


def test_finds_a_flipped_bit_in_any_file(pristine_packed: Path, packed: Path) -> None:
    """Opening reads headers only, so it cannot notice; reading everything again must."""
    manifest = Manifest.read(packed)
    reports: list[tuple[int, int]] = []
    assert manifest.damaged_files(packed, lambda *report: reports.append(report)) == []
    total = sum(path.stat().st_size for path in packed.iterdir() if path.name != MANIFEST)
    assert reports[-1] == (total, total) and reports == sorted(reports)
    for name in manifest.files:
        content = bytearray((pristine_packed / name).read_bytes())
        content[-2] ^= 1
        (packed / name).write_bytes(content)
        assert manifest.damaged_files(packed, lambda *_: None) == [f"{name} differs from its checksum"]
        content[-2] ^= 1
        (packed / name).write_bytes(content)


def test_lists_all_damaged_files(packed: Path) -> None:
    manifest = Manifest.read(packed)
    remove_layer(packed)
    os.truncate(packed / DENSE, 100)
    (packed / "config.json").write_text(json.dumps({}) + " " * (manifest.files["config.json"].bytes - 2))
    damaged = manifest.damaged_files(packed, lambda *_: None)
    assert [line.split()[0] for line in sorted(damaged)] == ["config.json", DENSE, EXPERTS]
