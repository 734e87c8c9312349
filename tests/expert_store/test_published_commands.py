"""`start`, `pack`, `inspect` and `verify` on directories in published HLWQ layouts."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from common.checkpoint import PackedCheckpoint
from common.errors import CheckpointError, ConfigError
from common.record import ExpertBits
from expert_store.inspect import describe
from expert_store.models import resolve_model
from tests.expert_store.test_files_cli import run
from tests.helpers import published
from tests.helpers.models import edited_json, edited_tensors
from tests.helpers.published import Layout, published_model

WEIGHTS = "model.safetensors"
every_layout = pytest.mark.parametrize(
    ("layout", "bits"), published.ONE_OF_EACH, ids=lambda value: getattr(value, "__name__", str(value))
)


def resolve(directory: Path, bits: int | None = None) -> PackedCheckpoint:
    return resolve_model(str(directory), bits, Console(file=io.StringIO()))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_SERVING_CACHE", str(tmp_path / "cache"))


@every_layout
def test_every_layout_in_every_command(pristine: Path, tmp_path: Path, layout: Layout, bits: int) -> None:
    model = published_model(pristine, bits)
    directory = model.write(tmp_path / "model", layout, polar_config=False)
    assert run("verify", directory).splitlines()[-1].startswith("OK: ")
    kinds = {"up_proj": bits, "down_proj": bits, "dense": bits}
    assert json.loads(run("inspect", directory, "--json"))["bits"] == kinds
    assert f"16 experts at {bits} bits, dense {bits}" in run("pack", directory, tmp_path / "packed")
    started = resolve(directory)
    assert started.fingerprint == PackedCheckpoint.open(tmp_path / "packed").fingerprint
    assert started.layout.bits == (ExpertBits(bits, bits),) * 2


def test_start_keeps_bits_unless_others_are_asked_for(pristine: Path, tmp_path: Path) -> None:
    directory = published_model(pristine, 4).write(tmp_path / "model", published.nibbles)
    kept = resolve(directory)
    assert resolve(directory, bits=4).directory == kept.directory
    other = resolve(directory, bits=3)
    assert other.layout.bits == (ExpertBits(3, 3),) * 2 and set(other.plan.dense.values()) == {4}
    with pytest.raises(ConfigError, match="bits 7"):
        resolve(directory, bits=7)


def test_start_packs_anew_when_polar_config_changes(pristine: Path, tmp_path: Path) -> None:
    directory = published_model(pristine, 5).write(tmp_path / "model", published.double_underscore)
    first = resolve(directory)
    with edited_json(directory / "polar_config.json") as config:
        for layer in config["layers"].values():
            layer["bits"] = 6
    assert resolve(directory).layout.bits != first.layout.bits


def test_inspect_names_layouts_and_bits_by_kind(pristine: Path, tmp_path: Path) -> None:
    model = published_model(pristine, published.MIXED)
    directory = model.write(tmp_path / "model", published.polar_engine)
    described = describe(directory)
    counts = {"nibbles": 0, "Q5 packed": 0, "int8": 0}
    for matrix in model.matrices.values():
        counts["nibbles" if matrix.bits <= 4 else "Q5 packed" if matrix.bits == 5 else "int8"] += 1
    assert described["layouts"] == counts
    assert described["bits"] == {
        "up_proj": 3, "down_proj": 4, "in_proj": 5, "out_proj": 6, "q_proj": 5, "k_proj": 5, "v_proj": 5,
        "o_proj": 6, "shared_experts.up_proj": 8, "shared_experts.down_proj": 8, "mlp.up_proj": None,
        "mlp.down_proj": None, "lm_head": 6,
    }  # fmt: skip
    stored = sum(tensor.nbytes for tensor in model.tensors(published.polar_engine).values())
    assert sum(described["bytes"].values()) == stored
    assert "Q5 packed" in run("inspect", directory)


def test_inspect_of_plain_and_packed_checkpoints(pristine: Path, pristine_packed: Path) -> None:
    assert describe(pristine)["layouts"] is None and describe(pristine_packed)["layouts"] is None


def test_verify_lists_every_damaged_weight_and_no_other(pristine: Path, tmp_path: Path) -> None:
    directory = published_model(pristine, 5).write(tmp_path / "model", published.int8)
    with edited_tensors(directory / WEIGHTS) as tensors:
        tensors["backbone.layers.1.mixer.experts.2.down_proj.codes"][3, 3] = 77
        tensors["lm_head.norms"][5, 0] = float("nan")
        tensors["backbone.layers.0.mixer.A_log"][0] = float("inf")
    output = run("verify", directory, status=1)
    lines = [line for line in output.splitlines() if line.startswith(str(directory))]
    assert len(lines) == 3 and "OK" not in output
    for complaint in (
        "2.down_proj.codes holds code 77",
        "lm_head.norms holds",
        "A_log: weights are not finite",
    ):
        assert any(complaint in line for line in lines)


def test_verify_of_a_plain_directory(pristine: Path) -> None:
    assert run("verify", pristine).splitlines()[-1].startswith("OK: ")


def test_verify_refuses_what_headers_tell(pristine: Path, tmp_path: Path) -> None:
    directory = published_model(pristine, 5).write(tmp_path / "model", published.q5)
    with edited_tensors(directory / WEIGHTS) as tensors:
        del tensors["lm_head.norms"]
    with pytest.raises(CheckpointError, match=r"lm_head\.codes is there without"):
        run("verify", directory)


def test_a_refusal_while_packing_leaves_nothing(pristine: Path, tmp_path: Path) -> None:
    directory = published_model(pristine, 5).write(tmp_path / "model", published.hlwq)
    with edited_tensors(directory / WEIGHTS) as tensors:
        tensors["backbone.layers.3.mixer.experts.7.down_proj.weight__norms"][0, 0] = torch.inf
    with pytest.raises(CheckpointError, match=r"3\.mixer\.experts\.7\.down_proj\.weight__norms holds"):
        run("pack", directory, tmp_path / "made")
    with pytest.raises(CheckpointError, match=r"7\.down_proj\.weight__norms"):
        resolve(directory)
    assert not (tmp_path / "made").exists()
    assert [path.suffix for path in (tmp_path / "cache" / "packed").iterdir()] == [".lock"]
