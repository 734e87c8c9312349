"""`inspect --errors` against errors computed from the tensors that safetensors reads and packing writes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.checkpoint import PackedCheckpoint, open_checkpoint
from common.checkpoint.names import expert_names, packable_dense
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.checkpoint.source import Matrix
from common.errors import CheckpointError, ConfigError
from common.expert_key import ExpertKey
from common.hlwq.matrix import PackedMatrix
from expert_store.error_report import measure
from tests.expert_store.test_files_cli import run
from tests.helpers.models import edited_tensors, make_hf_model

RECIPE = {"*.experts.*.up_proj": 3, "*.experts.*.down_proj": 5, "*.layers.0.mixer.in_proj": 4, "lm_head": 6}
KINDS: list[tuple[str, str, list[int | None]]] = [
    ("experts.up_proj", r"\.experts\.\d+\.up_proj", [3]),
    ("experts.down_proj", r"\.experts\.\d+\.down_proj", [5]),
    ("in_proj", r"\.in_proj", [4, None]),
    ("out_proj", r"\.out_proj", [None]),
    ("shared_experts.up_proj", r"shared_experts\.up_proj", [None]),
    ("shared_experts.down_proj", r"shared_experts\.down_proj", [None]),
    ("q_proj", r"q_proj", [None]),
    ("k_proj", r"k_proj", [None]),
    ("v_proj", r"v_proj", [None]),
    ("o_proj", r"\.o_proj", [None]),
    ("mlp.up_proj", r"mixer\.up_proj", [None]),
    ("mlp.down_proj", r"mixer\.down_proj", [None]),
    ("lm_head", r"lm_head", [6]),
]
MATRIX = "backbone.layers.1.mixer.experts.3.up_proj.weight"


def silent(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def mixed(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    """The tiny model at several numbers of bits, in another directory than the original's."""
    source = open_checkpoint(pristine)
    destination = tmp_path_factory.mktemp("mixed") / "packed"
    return pack(source, destination, make_plan(source, recipe=RECIPE), silent)


@pytest.fixture(scope="module")
def report(mixed: PackedCheckpoint, pristine: Path) -> dict[str, Any]:
    return measure(mixed, open_checkpoint(pristine), silent)


def served(mixed: PackedCheckpoint) -> dict[str, Tensor]:
    """Every matrix by name as it is served, decoded where it is packed."""
    weights: dict[str, Matrix] = {name: mixed.dense_matrix(name) for name in mixed.dense_stored}
    for layer in range(mixed.config.num_layers):
        for expert in range(mixed.config.n_routed_experts):
            key = ExpertKey(layer, expert)
            weights.update(zip(expert_names(mixed.config, key), mixed.expert(key), strict=True))
    return {
        name: weight.decode() if isinstance(weight, PackedMatrix) else weight.float()
        for name, weight in weights.items()
    }


@pytest.mark.parametrize(("kind", "pattern", "bits"), KINDS)
def test_row_of_a_kind(
    kind: str,
    pattern: str,
    bits: list[int | None],
    report: dict[str, Any],
    mixed: PackedCheckpoint,
    pristine: Path,
) -> None:
    originals, errors, cosines = load_file(pristine / "model.safetensors"), {}, []
    for name, weight in served(mixed).items():
        if re.search(pattern, name):
            ours, original = weight.double(), originals[name].double()
            errors[name.removesuffix(".weight")] = float((ours - original).norm() / original.norm())
            cosines.append(float(torch.cosine_similarity(ours.view(-1), original.view(-1), 0)))
    worst = max(errors, key=lambda name: errors[name])
    (row,) = (row for row in report["kinds"] if row["kind"] == kind)
    assert (row["count"], row["bits"], row["worst"]) == (len(errors), bits, worst)
    assert row["worst_error"] == pytest.approx(errors[worst], rel=1e-6)
    assert row["relative_error"] == pytest.approx(sum(errors.values()) / len(errors), rel=1e-6)
    assert row["cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-9)


def test_every_packable_matrix_is_in_one_row(report: dict[str, Any], mixed: PackedCheckpoint) -> None:
    assert [row["kind"] for row in report["kinds"]] == [kind for kind, *_ in KINDS]
    assert sum(row["count"] for row in report["kinds"]) == 32 + len(packable_dense(mixed.config))


def test_nothing_differs_from_itself(pristine: Path) -> None:
    original = open_checkpoint(pristine)
    seen: list[tuple[int, int]] = []
    report = measure(original, original, lambda done, total: seen.append((done, total)))
    assert {(row["worst_error"], row["cosine"]) for row in report["kinds"]} == {(0.0, 1.0)}
    assert seen[-1][0] == seen[-1][1] and len(seen) == 16 + len(packable_dense(original.config))


def test_command(pristine: Path, mixed: PackedCheckpoint, report: dict[str, Any]) -> None:
    words = ("inspect", mixed.directory, "--errors", "--against", pristine)
    (line,) = run(*words, "--json").splitlines()
    described = json.loads(line)
    assert described["errors"] == report and described["bits"]["up_proj"] == 3
    text = run(*words)
    for row in report["kinds"]:
        assert row["kind"] in text and row["worst"] in text and f"{row['relative_error']:.5f}" in text


def test_finds_the_source_beside_it(pristine: Path, pristine_packed: Path, tmp_path: Path) -> None:
    assert json.loads(run("inspect", pristine_packed, "--errors", "--json"))["errors"]["against"] == str(
        pristine
    )
    moved = shutil.copytree(pristine_packed, tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"was packed from tiny, which is not at .*--against SRC"):
        run("inspect", moved, "--errors")
    # Copied without its times: for all that can be known, other files.
    shutil.copytree(pristine, tmp_path / "tiny", copy_function=shutil.copy)
    with pytest.raises(ConfigError, match=r"not at .* as it was then"):
        run("inspect", moved, "--errors")


def test_refusals(pristine: Path, mixed: PackedCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not say what it was quantized from.*--against SRC"):
        run("inspect", pristine, "--errors")
    run("inspect", pristine, "--against", pristine, status=2)
    other = make_hf_model(tmp_path / "other", hidden_size=256)
    with pytest.raises(CheckpointError, match="another model"):
        run("inspect", mixed.directory, "--errors", "--against", other)
    broken = shutil.copytree(pristine, tmp_path / "broken")
    with edited_tensors(broken / "model.safetensors") as tensors:
        tensors[MATRIX][3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=re.escape(MATRIX)):
        run("inspect", mixed.directory, "--errors", "--against", broken)
