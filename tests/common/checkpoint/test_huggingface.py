"""Reading unpacked checkpoints: every way of naming and storing them, and every refusal."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.checkpoint import HuggingFaceCheckpoint
from common.checkpoint.names import dense_shapes
from common.errors import CheckpointError, ConfigError
from common.expert_key import ExpertKey
from tests.helpers.models import edited_json, edited_tensors, random_model, tiny_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP_3 = "backbone.layers.1.mixer.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def reference(pristine: Path) -> dict[str, Tensor]:
    """The tiny model's tensors by published name, experts one by one."""
    return load_file(pristine / WEIGHTS)


def assert_same(checkpoint: HuggingFaceCheckpoint, reference: dict[str, Tensor]) -> None:
    """Every tensor of `reference` comes out of `checkpoint`, and nothing else."""
    found = {name: checkpoint.dense_matrix(name) for name in checkpoint.dense_stored}
    blocks = (1, 3)
    for layer, block in enumerate(blocks):
        for expert in range(8):
            up, down = checkpoint.expert(ExpertKey(layer, expert))
            found[f"backbone.layers.{block}.mixer.experts.{expert}.up_proj.weight"] = up
            found[f"backbone.layers.{block}.mixer.experts.{expert}.down_proj.weight"] = down
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_reads_one_file(pristine: Path, reference: dict[str, Tensor]) -> None:
    checkpoint = HuggingFaceCheckpoint.open(pristine)
    assert checkpoint.config.pattern == "ME*E-M"
    assert_same(checkpoint, reference)
    sizes = checkpoint.routed_bytes + sum(info.size for info in checkpoint.dense_stored.values())
    assert sizes == sum(tensor.nbytes for tensor in reference.values())


def test_reads_shards(tmp_path: Path, reference: dict[str, Tensor]) -> None:
    random_model().save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(HuggingFaceCheckpoint.open(tmp_path), reference)


def test_reads_the_names_transformers_has_in_memory(tmp_path: Path, reference: dict[str, Tensor]) -> None:
    """`model.` instead of `backbone.`, and the experts of a layer stacked."""
    random_model().save_pretrained(tmp_path, save_original_format=False)
    names = load_file(tmp_path / WEIGHTS).keys()
    assert "model.layers.1.mixer.experts.up_proj" in names and "model.norm_f.weight" in names
    assert_same(HuggingFaceCheckpoint.open(tmp_path), reference)


def test_reads_experts_stacked_under_published_names(model: Path, reference: dict[str, Tensor]) -> None:
    with edited_tensors(model / WEIGHTS) as tensors:
        for matrix in ("up_proj", "down_proj"):
            prefix = "backbone.layers.3.mixer.experts."
            experts = [tensors.pop(f"{prefix}{expert}.{matrix}.weight") for expert in range(8)]
            tensors[prefix + matrix] = torch.stack(experts)
    assert_same(HuggingFaceCheckpoint.open(model), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_reads_other_dtypes(model: Path, reference: dict[str, Tensor], dtype: torch.dtype) -> None:
    converted = {name: tensor.to(dtype) for name, tensor in reference.items()}
    save_file(converted, model / WEIGHTS)
    assert_same(HuggingFaceCheckpoint.open(model), converted)


def test_reads_both_ways_of_naming_the_pattern(model: Path, reference: dict[str, Tensor]) -> None:
    with edited_json(model / "config.json") as config:
        assert "layers_block_type" in config  # what transformers wrote
        config.clear()
        config.update(tiny_config())
    assert_same(HuggingFaceCheckpoint.open(model), reference)


def test_convolution_bias_follows_the_config(pristine: Path) -> None:
    config = HuggingFaceCheckpoint.open(pristine).config
    assert "backbone.layers.0.mixer.conv1d.bias" in dense_shapes(config)
    object.__setattr__(config, "use_conv_bias", False)
    assert "backbone.layers.0.mixer.conv1d.bias" not in dense_shapes(config)


def test_reads_nothing_before_it_is_asked(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then what was asked for: of experts that are stacked in one tensor, that one expert."""
    pieces: list[int] = []
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *call: pieces.append(read(*call)) or pieces[-1])
    checkpoint = HuggingFaceCheckpoint.open(pristine)
    assert (checkpoint.dense_stored, checkpoint.expert_bits) and pieces == []
    checkpoint.expert(ExpertKey(0, 0))
    assert pieces == [2 * 72 * 128, 2 * 72 * 128]


def test_reads_one_of_stacked_experts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with edited_tensors(model / WEIGHTS) as tensors:
        prefix = "backbone.layers.1.mixer.experts."
        for matrix in ("up_proj", "down_proj"):
            experts = [tensors.pop(f"{prefix}{expert}.{matrix}.weight") for expert in range(8)]
            tensors[prefix + matrix] = torch.stack(experts)
    test_reads_nothing_before_it_is_asked(model, monkeypatch)


def test_ignores_multi_token_prediction_and_warns_of_the_rest(
    model: Path, reference: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with edited_tensors(model / WEIGHTS) as tensors:
        tensors["mtp.layers.0.norm.weight"] = torch.zeros(3)
    with caplog.at_level(logging.WARNING):
        HuggingFaceCheckpoint.open(model)
    assert not caplog.records
    with edited_tensors(model / WEIGHTS) as tensors:
        tensors |= {f"vision.{i}.weight": torch.zeros(3) for i in range(5)}
    with caplog.at_level(logging.WARNING):
        checkpoint = HuggingFaceCheckpoint.open(model)
    assert "vision.0.weight" in caplog.text and "2 more" in caplog.text and "mtp" not in caplog.text
    assert_same(checkpoint, reference)


def test_identity_changes_with_the_source(model: Path) -> None:
    before = HuggingFaceCheckpoint.open(model).identity
    assert HuggingFaceCheckpoint.open(model).identity == before
    os.utime(model / WEIGHTS, ns=(0, 0))
    touched = HuggingFaceCheckpoint.open(model).identity
    assert touched != before
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert HuggingFaceCheckpoint.open(model).identity != touched


def truncate(model: Path) -> None:
    os.truncate(model / WEIGHTS, (model / WEIGHTS).stat().st_size - 1)


def corrupt_header(model: Path) -> None:
    content = bytearray((model / WEIGHTS).read_bytes())
    content[8:20] = b"\xff" * 12
    (model / WEIGHTS).write_bytes(content)


def drop(name: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        with edited_tensors(model / WEIGHTS) as tensors:
            del tensors[name]

    return damage


def replace(name: str, tensor: Tensor) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        with edited_tensors(model / WEIGHTS) as tensors:
            tensors[name] = tensor

    return damage


def remove_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()


def stack_too_few(model: Path) -> None:
    with edited_tensors(model / WEIGHTS) as tensors:
        tensors["model.layers.1.mixer.experts.up_proj"] = torch.zeros(7, 72, 128)
        tensors["model.layers.1.mixer.experts.down_proj"] = torch.zeros(8, 128, 72)


def name_twice(model: Path) -> None:
    with edited_tensors(model / WEIGHTS) as tensors:
        tensors["model.norm_f.weight"] = torch.ones(128)


@pytest.mark.parametrize(
    ("damage", "complaints"),
    [
        (truncate, [WEIGHTS, "truncated"]),
        (corrupt_header, [WEIGHTS, "not a safetensors file"]),
        (remove_weights, [WEIGHTS, INDEX]),
        (drop("backbone.layers.0.mixer.A_log"), ["lacks backbone.layers.0.mixer.A_log"]),
        (drop(UP_3), [f"lacks {UP_3}"]),
        (replace("backbone.norm_f.weight", torch.ones(127)), [WEIGHTS, "norm_f", "[127]", "[128]"]),
        (replace(UP_3, torch.zeros(128, 72)), [WEIGHTS, UP_3, "[128, 72]", "[72, 128]"]),
        (replace(UP_3, torch.zeros(72, 128).to(torch.float8_e4m3fn)), [WEIGHTS, UP_3, "F8_E4M3"]),
        (replace("lm_head.weight", torch.zeros(96, 128, dtype=torch.float64)), ["lm_head.weight", "F64"]),
        (stack_too_few, ["layers.1.mixer.experts.up_proj", "[7, 72, 128]", "[8, 72, 128]"]),
        (name_twice, ["model.norm_f.weight", "backbone.norm_f.weight", "twice"]),
    ],
    ids=lambda value: getattr(value, "__name__", "-"),
)
def test_refuses_damaged_weights(model: Path, damage: Callable[[Path], None], complaints: list[str]) -> None:
    damage(model)
    with pytest.raises(CheckpointError) as refusal:
        HuggingFaceCheckpoint.open(model)
    for complaint in complaints:
        assert complaint in str(refusal.value)


@pytest.mark.parametrize(
    ("shard", "complaints"),
    [
        ("absent.safetensors", ["absent.safetensors is missing"]),
        ("other.safetensors", ["norm_f", "other.safetensors", "does not hold it"]),
        ("../other.safetensors", ["outside the directory"]),
    ],
)
def test_refuses_a_wrong_index(model: Path, shard: str, complaints: list[str]) -> None:
    """A shard is missing, lacks a tensor that the index places in it, or lies elsewhere."""
    names = load_file(model / WEIGHTS).keys()
    (model / WEIGHTS).rename(model / "whole.safetensors")
    save_file({"unrelated": torch.zeros(1)}, model / "other.safetensors")
    save_file({"backbone.norm_f.weight": torch.zeros(128)}, model.parent / "other.safetensors")
    (model / INDEX).write_text("{}")
    with edited_json(model / INDEX) as index:
        index["weight_map"] = dict.fromkeys(names, "whole.safetensors")
    HuggingFaceCheckpoint.open(model)
    with edited_json(model / INDEX) as index:
        index["weight_map"]["backbone.norm_f.weight"] = shard
    with pytest.raises(CheckpointError) as refusal:
        HuggingFaceCheckpoint.open(model)
    for complaint in complaints:
        assert complaint in str(refusal.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": ["x"]}'])
def test_refuses_an_index_that_is_none(model: Path, content: str) -> None:
    remove_weights(model)
    (model / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="index of shards"):
        HuggingFaceCheckpoint.open(model)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "unsupported architecture"),
        ({"mlp_hidden_act": "gelu"}, "mlp_hidden_act='gelu'"),
        ({"mamba_hidden_act": "relu"}, "mamba_hidden_act='relu'"),
    ],
)
def test_refuses_what_it_cannot_serve(model: Path, change: dict[str, Any], complaint: str) -> None:
    with edited_json(model / "config.json") as config:
        config.update(change)
    with pytest.raises(ConfigError, match=complaint):
        HuggingFaceCheckpoint.open(model)


def test_refuses_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        HuggingFaceCheckpoint.open(tmp_path)
