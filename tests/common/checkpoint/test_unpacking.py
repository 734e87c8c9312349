"""Unpacking whole checkpoints: which tensors lie where, and what comes back when they are read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, NemotronHForCausalLM

from common.checkpoint import PackedCheckpoint, open_checkpoint
from common.checkpoint.manifest import MANIFEST
from common.checkpoint.names import dense_shapes, expert_names
from common.checkpoint.packed import layer_file
from common.checkpoint.packed_writer import pack
from common.checkpoint.packing import PUBLISHED
from common.checkpoint.plan import make_plan
from common.checkpoint.source import Matrix
from common.expert_key import ExpertKey
from common.hlwq.codebook import published_codebook
from common.hlwq.matrix import PackedMatrix
from common.hlwq.quantize import quantize
from tests.helpers import published
from tests.helpers.models import edited_json, edited_tensors, pack_model, unpack_model
from tests.helpers.published import Layout, published_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP_0 = "backbone.layers.1.mixer.experts.0.up_proj"
IN_PROJ = "backbone.layers.0.mixer.in_proj"
KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(8)]
MIXED = {"*.experts.*.up_proj": 3, "*.experts.*.down_proj": 4, "*.in_proj": 5, "*.o_proj": 6, "lm_head": 8}


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    """Where to unpack."""
    return tmp_path / "plain"


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()
    }


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def packed_with(recipe: dict[str, int], source: Path, destination: Path) -> Path:
    checkpoint = open_checkpoint(source)
    return pack(checkpoint, destination, make_plan(checkpoint, recipe=recipe), lambda *_: None).directory


def matrices_of(source: Path) -> dict[str, Matrix]:
    """Every weight as the checkpoint gives it, by name without `.weight`."""
    checkpoint = open_checkpoint(source)
    found = {name: checkpoint.dense_matrix(name) for name in dense_shapes(checkpoint.config)}
    for key in KEYS:
        found |= zip(expert_names(checkpoint.config, key), checkpoint.expert(key), strict=True)
    return {name.removesuffix(".weight"): matrix for name, matrix in found.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_sixteen_bits_come_back_byte_for_byte(
    model: Path, tmp_path: Path, destination: Path, dtype: torch.dtype
) -> None:
    """Experts are kept in bfloat16; dense weights have the dtype that the source stores them in."""
    with edited_tensors(model / WEIGHTS) as tensors:
        for name, tensor in tensors.items():
            if ".experts." not in name:
                tensors[name] = tensor.to(dtype)
    packed = pack_model(model, tmp_path / "packed", 16, 16).directory
    unpack_model(packed, destination)
    assert_same_tensors(tensors_of(destination), load_file(model / WEIGHTS))


@pytest.mark.parametrize("layout", ["bf16", "hlwq-q5", "polar_engine_v5"])
def test_a_plain_model_stays_as_it_is(pristine: Path, destination: Path, layout: str) -> None:
    unpack_model(pristine, destination, layout)
    assert_same_tensors(tensors_of(destination), load_file(pristine / WEIGHTS))


def test_stacked_experts_become_one_by_one(model: Path, pristine: Path, destination: Path) -> None:
    with edited_tensors(model / WEIGHTS) as tensors:
        prefix = "backbone.layers.3.mixer.experts."
        for matrix in ("up_proj", "down_proj"):
            experts = [tensors.pop(f"{prefix}{expert}.{matrix}.weight") for expert in range(8)]
            tensors[prefix + matrix] = torch.stack(experts)
    unpack_model(model, destination)
    assert_same_tensors(tensors_of(destination), load_file(pristine / WEIGHTS))


def test_codes_are_decoded_and_dense_ones_too(pristine: Path, tmp_path: Path, destination: Path) -> None:
    source = packed_with(MIXED, pristine, tmp_path / "packed")
    found = tensors_of(unpack_model(source, destination))
    kinds = set()
    for name, matrix in matrices_of(source).items():
        tensor = found.pop(name + ".weight" if name + ".weight" in found else name)
        expected = matrix.decode(torch.bfloat16) if isinstance(matrix, PackedMatrix) else matrix
        kinds.add(matrix.bits if isinstance(matrix, PackedMatrix) else None)
        assert torch.equal(tensor, expected), name
    assert kinds == {None, 3, 4, 5, 6, 8} and not found


@pytest.mark.parametrize("largest_shard", [40_000, 300_000, 10**9])
def test_shards_and_index(
    pristine: Path, pristine_packed: Path, destination: Path, largest_shard: int
) -> None:
    unpack_model(pristine_packed, destination, largest_shard=largest_shard)
    files = sorted(destination.glob("*.safetensors"))
    held = {path.name: load_file(path) for path in files}
    sizes = {name: sum(tensor.nbytes for tensor in tensors.values()) for name, tensors in held.items()}
    assert len({name for tensors in held.values() for name in tensors}) == sum(map(len, held.values()))
    assert {name for tensors in held.values() for name in tensors} == load_file(pristine / WEIGHTS).keys()
    for name, tensors in held.items():
        alone = len(tensors) == 1  # no shard can hold part of a tensor
        assert sizes[name] <= largest_shard or alone
        with safe_open(destination / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    if largest_shard == 10**9:
        assert [path.name for path in files] == [WEIGHTS] and not (destination / INDEX).exists()
        return
    count = len(files)
    assert count > 2
    assert list(held) == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    index = json.loads((destination / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}


@pytest.mark.parametrize("largest_shard", [300_000, 10**9])
def test_transformers_loads_it(pristine_packed: Path, destination: Path, largest_shard: int) -> None:
    unpack_model(pristine_packed, destination, largest_shard=largest_shard)
    for cls in (AutoModelForCausalLM, NemotronHForCausalLM):
        model, report = cls.from_pretrained(destination, output_loading_info=True)
        assert isinstance(model, NemotronHForCausalLM)
        assert not any(report.values()), report
        experts = model.state_dict()["model.layers.1.mixer.experts.up_proj"]
    decoded = [PackedCheckpoint.open(pristine_packed).expert(ExpertKey(0, e))[0].decode() for e in range(8)]
    assert torch.equal(experts, torch.stack(decoded).to(experts.dtype))


WRITERS: dict[str, tuple[str, Layout, dict[str, int] | int]] = {
    "hlwq-q5": ("hlwq-q5", published.hlwq, 5),
    "polar_engine_v5": ("polar_engine_v5", published.polar_engine, 5),
    "polar_engine_v5, mixed": ("polar_engine_v5", published.polar_engine, MIXED),
}


@pytest.mark.parametrize("case", WRITERS)
@pytest.mark.parametrize("by_way_of", ["a published layout", "a packed checkpoint"])
def test_published_layouts_are_those_of_another_writer(
    pristine: Path, tmp_path: Path, destination: Path, case: str, by_way_of: str
) -> None:
    """From codes in a third layout, directly or packed, come the very tensors that plain NumPy writes."""
    layout, writer, bits = WRITERS[case]
    original = published_model(pristine, bits)
    source = original.write(tmp_path / "published", published.int8)
    if by_way_of == "a packed checkpoint":
        source = packed_with({}, source, tmp_path / "packed")
    unpack_model(source, destination, layout)
    expected = original.tensors(writer)
    for name, tensor in expected.items():
        if name.endswith(".codes") and original.matrices[name.removesuffix(".codes")].bits == 8:
            expected[name] = tensor.view(torch.uint8)
    assert_same_tensors(tensors_of(destination), expected)
    polar_config = json.loads((destination / "polar_config.json").read_text())
    assert polar_config == original.polar_config() | {"format": layout}


@pytest.mark.parametrize(("layout", "recipe"), [("polar_engine_v5", MIXED), ("polar_engine_v5", {})])
def test_records_survive_a_published_layout(
    pristine: Path, tmp_path: Path, destination: Path, layout: str, recipe: dict[str, int]
) -> None:
    before = packed_with(recipe, pristine, tmp_path / "before")
    after = packed_with({}, unpack_model(before, destination, layout), tmp_path / "after")
    assert PackedCheckpoint.open(after).plan == PackedCheckpoint.open(before).plan
    for name in ("dense.safetensors", layer_file(0), layer_file(1)):
        assert (before / name).read_bytes() == (after / name).read_bytes(), name


def test_records_survive_hlwq_q5(pristine: Path, tmp_path: Path, destination: Path) -> None:
    source = published_model(pristine, 5).write(tmp_path / "published", published.q5)
    before = packed_with({}, source, tmp_path / "before")
    after = packed_with({}, unpack_model(before, destination, "hlwq-q5"), tmp_path / "after")
    for name in ("dense.safetensors", layer_file(0), layer_file(1)):
        assert (before / name).read_bytes() == (after / name).read_bytes(), name


def test_own_packs_reach_both_published_layouts(pristine: Path, tmp_path: Path) -> None:
    """Under the published codebook, with fitted norms as ever: the layout that implies it loses nothing."""
    source = open_checkpoint(pristine)
    plan = make_plan(source, dense_bits=5)
    before = pack(source, tmp_path / "before", plan, lambda *_: None, codebook=PUBLISHED)
    assert before.manifest.codebook == PUBLISHED
    original = matrices_of(pristine)
    for name, matrix in matrices_of(before.directory).items():
        if isinstance(matrix, PackedMatrix):
            assert matrix.norms is not None and matrix.codebook is not None
            codes, norms = quantize(original[name], published_codebook(5), fit_norms=True)
            assert torch.equal(matrix.codes(), codes) and torch.equal(matrix.norms, norms)
            assert torch.equal(matrix.codebook, published_codebook(5))
    for layout in ("hlwq-q5", "polar_engine_v5"):
        after = packed_with(
            {}, unpack_model(before.directory, tmp_path / f"{layout}-plain", layout), tmp_path / layout
        )
        for name in ("dense.safetensors", layer_file(0), layer_file(1)):
            assert (before.directory / name).read_bytes() == (after / name).read_bytes(), name


def test_codes_keep_bits_that_differ_within_a_layer(
    pristine: Path, tmp_path: Path, destination: Path
) -> None:
    """Experts come out at the bits of their layer's widest, with the codes they have; plain ones plain."""
    recipe = {f"{UP_0}": 3, "*.experts.[1-6].*": 5}
    source = published_model(pristine, recipe).write(tmp_path / "published", published.int8)
    found = tensors_of(unpack_model(source, destination, "polar_engine_v5"))
    original = load_file(source / WEIGHTS)
    again = matrices_of(destination)[UP_0]
    assert isinstance(again, PackedMatrix) and again.bits == 5
    assert torch.equal(again.codes(), original[f"{UP_0}.codes"].view(torch.uint8))
    assert again.codebook is not None
    torch.testing.assert_close(again.codebook[:8], original[f"{UP_0}.ct_scaled"] * 128**0.5)
    for name in ("backbone.layers.3.mixer.experts.7.up_proj.weight", f"{UP_0[:-7]}down_proj.weight"):
        assert torch.equal(found[name], original[name])


def test_carries_config_tokenizer_and_chat_template(model: Path, tmp_path: Path, destination: Path) -> None:
    carried = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{ }",
        "chat_template.jinja": "{{ messages }}",
    }
    for name, content in (carried | {"notes.txt": "", "modeling.py": ""}).items():
        (model / name).write_text(content)
    unpack_model(pack_model(model, tmp_path / "packed").directory, destination)
    for name in (*carried, "config.json", "generation_config.json"):
        assert (destination / name).read_bytes() == (model / name).read_bytes()
    assert {path.name for path in destination.iterdir()} == {
        *carried, "config.json", "generation_config.json", WEIGHTS,
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["bf16", "polar_engine_v5"])
def test_the_config_loses_what_speaks_of_the_source_alone(
    model: Path, destination: Path, layout: str
) -> None:
    """Its layout, and code that does not travel: whoever allows remote code must not look for it in vain."""
    before = json.loads((model / "config.json").read_text())
    with edited_json(model / "config.json") as config:
        config["quantization_config"] = {"quant_method": "polarengine"}
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"}
    unpack_model(model, destination, layout)
    assert json.loads((destination / "config.json").read_text()) == before
    AutoModelForCausalLM.from_pretrained(destination, trust_remote_code=True)


def test_synthetic_weights_stay_marked(packed: Path, tmp_path: Path, destination: Path) -> None:
    with edited_json(packed / MANIFEST) as manifest:
        manifest["synthetic"] = True
    unpack_model(packed, destination)
    assert open_checkpoint(destination).synthetic
    assert PackedCheckpoint.open(packed_with({}, destination, tmp_path / "again")).synthetic
    AutoModelForCausalLM.from_pretrained(destination)


def test_real_weights_are_not_marked(pristine_packed: Path, destination: Path) -> None:
    assert not open_checkpoint(unpack_model(pristine_packed, destination)).synthetic
