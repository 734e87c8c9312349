"""Every damage to a packed checkpoint is found: at open from headers and sizes, else by reading all of it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from common.checkpoint import PackedCheckpoint
from common.checkpoint.checksum import FileEntry, checksum
from common.checkpoint.manifest import MANIFEST, Manifest
from common.errors import CheckpointError, ConfigError
from tests.helpers.models import edited_json, edited_tensors

DENSE, EXPERTS = "dense.safetensors", "experts-00001.safetensors"


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
    return Manifest([], {}, 0, "", 0, 0, "", {}, entries).fingerprint


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


def list_another_directorys_file(packed: Path) -> None:
    (packed.parent / "another").write_text("{}")
    with edited_json(packed / MANIFEST) as raw:
        raw["files"]["../another"] = {"bytes": 2, "sha256": "0" * 64}
        raw["fingerprint"] = fingerprint(raw)


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
        (set_in_manifest(version=3), "version 3.*reads version 2.*newer expert-serving"),
        (set_in_manifest(version=1), "version 1.*reads version 2: pack the model again"),
        (set_in_manifest(format="other"), "not the manifest of a packed checkpoint"),
        (set_in_manifest(layout="0" * 32), "another layout"),
        (set_in_manifest(expert_bits=[[5, 4], [5, 4]]), "another layout"),
        (set_in_manifest(expert_bits=[[5, 5]]), "the bits of 1, config.json of 2"),
        (set_in_manifest(expert_bits=[5, 5]), "damaged.*expert_bits"),
        (set_in_manifest(dense_bits={"lm_head.weight": 5}), "lacks tensor 'lm_head.packed'"),
        (set_in_manifest(dense_bits={"backbone.norm_f.weight": 5}), "none: backbone.norm_f"),
        (set_in_manifest(stride="wide"), "damaged.*stride"),
        (set_in_manifest(files={}), "fingerprint"),
        (write_manifest("{"), "damaged"),
        (write_manifest("[]"), "damaged"),
        (unlist_layer, f"does not list {EXPERTS}"),
        (forge_checksum, "fingerprint"),
        (list_another_directorys_file, "lead out of the directory.*another"),
        (remove_layer, f"{EXPERTS} is missing"),
        (truncate_layer, f"{EXPERTS} has .* bytes instead of"),
        (truncate_layer_and_reseal, f"{EXPERTS} is truncated"),
        (drop_an_expert, f"{EXPERTS}: records has shape"),
        (rewrite_unaligned, f"{EXPERTS}.*multiple of 4096"),
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
    set_in_manifest(expert_bits=[[7, 5], [5, 5]])(packed)
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
