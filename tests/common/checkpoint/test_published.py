"""Reading the published HLWQ layouts: codes, norms and codebooks come out as written, bit for bit."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint import HuggingFaceCheckpoint
from common.checkpoint.names import packable_dense
from common.checkpoint.polar_config import Claims
from common.checkpoint.published import PublishedMatrix
from common.checkpoint.published_form import part_of, tell_form
from common.checkpoint.shards import find_tensors
from common.expert_key import ExpertKey
from common.hlwq.codebook import packing_codebook, published_codebook
from common.hlwq.matrix import PackedMatrix
from common.record import ExpertBits
from tests.common.hlwq.test_check_values import CODES_ROW_0, CODES_ROW_0_BLOCK_1, check_weights, numbers
from tests.helpers import published
from tests.helpers.models import edited_json
from tests.helpers.nemotron import relative_error
from tests.helpers.published import Codes, Layout, PublishedModel, assert_same, codes_of, published_model

IN_PROJ = "backbone.layers.0.mixer.in_proj"


def id_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


every_layout = pytest.mark.parametrize(
    ("layout", "bits"), [*published.ONE_OF_EACH, *published.MORE_BITS], ids=id_of
)


def read_all(directory: Path) -> dict[str, PackedMatrix]:
    """Every quantized matrix of a directory, by name without `.weight`."""
    checkpoint = HuggingFaceCheckpoint.open(directory)
    found = {name: checkpoint.dense_matrix(name) for name in packable_dense(checkpoint.config)}
    for layer, block in enumerate((1, 3)):
        for expert in range(8):
            pair = checkpoint.expert(ExpertKey(layer, expert))
            for matrix, projection in zip(pair, ("up_proj", "down_proj"), strict=True):
                found[f"backbone.layers.{block}.mixer.experts.{expert}.{projection}.weight"] = matrix
    return {
        name.removesuffix(".weight"): matrix
        for name, matrix in found.items()
        if isinstance(matrix, PackedMatrix)
    }


def assert_reads(directory: Path, model: PublishedModel) -> None:
    found = read_all(directory)
    assert found.keys() == model.matrices.keys()
    for name, written in model.matrices.items():
        assert_same(found[name], written)


@pytest.fixture(scope="module")
def five(pristine: Path) -> PublishedModel:
    return published_model(pristine, 5)


@every_layout
def test_codes_norms_and_codebook_come_back(
    pristine: Path, tmp_path: Path, layout: Layout, bits: int
) -> None:
    """Told from the tensors alone."""
    model = published_model(pristine, bits)
    assert_reads(model.write(tmp_path / "model", layout, polar_config=False), model)


@every_layout
def test_large_matrices_are_read_some_rows_at_a_time(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, bits: int
) -> None:
    monkeypatch.setattr("common.checkpoint.published._CODES_AT_ONCE", 3 * 128)
    monkeypatch.setattr("common.checkpoint.published._NORMS_AT_ONCE", 5)
    model = published_model(pristine, bits, (IN_PROJ, "lm_head"))
    assert_reads(model.write(tmp_path / "model", layout), model)


@pytest.mark.parametrize(("layout", "bits"), published.ONE_OF_EACH[2:], ids=id_of)
def test_polar_config_changes_nothing(pristine: Path, tmp_path: Path, layout: Layout, bits: int) -> None:
    model = published_model(pristine, bits)
    assert_reads(model.write(tmp_path / "model", layout), model)


@every_layout
def test_check_values(tmp_path: Path, layout: Layout, bits: int) -> None:
    """The matrix of the check values, two blocks a row of which the second is padded."""
    written = codes_of(check_weights(), bits)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in layout("w", written).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    parts = {}
    for place in find_tensors(tmp_path):
        found = part_of(place.name)
        assert found is not None and found[0] == "w.weight"
        parts[found[1]] = place
    # Two rows are too few to tell the bits from: codes without a codebook need them stated.
    matrix = PublishedMatrix(tell_form(parts, (2, 160), Claims(bits, None)))
    assert_same(matrix.read(), written)
    assert relative_error(matrix.read().decode(), written.decode()) < 1e-5
    assert torch.equal(matrix.decode(), matrix.read().decode(torch.bfloat16))
    if bits == 5:
        codes = matrix.read().codes()
        assert codes[0, :32].tolist() == numbers(CODES_ROW_0)
        assert codes[0, 128:144].tolist() == numbers(CODES_ROW_0_BLOCK_1)
        decoded = "0.0098876953125 0.0103759765625 0.0125732421875 0.0302734375 0.0284423828125 0.01220703125"
        assert matrix.decode()[0, :6].tolist() == numbers(decoded)


@pytest.mark.parametrize(
    ("layout", "bits", "expected"),
    [
        (published.q5, 5, [19, 54, 248, 158, 131, 13, 137, 8, 96, 148]),
        (published.hlwq, 5, [156, 27, 7, 189, 208, 106, 5, 16, 66, 50]),
        (published.nibbles, 4, [138, 136, 150, 168, 151, 119, 135, 120]),
    ],
    ids=id_of,
)
def test_packed_bytes_are_the_check_values(layout: Layout, bits: int, expected: list[int]) -> None:
    """What the other tests read is what the public reference writes."""
    parts = layout("w", codes_of(check_weights(), bits))
    packed = next(array for name, array in parts.items() if name.endswith((".codes", "packed")))
    assert packed.reshape(-1)[: len(expected)].tolist() == expected


@pytest.mark.parametrize("codebook", [published_codebook, packing_codebook])
@pytest.mark.parametrize("layout", [published.int8, published.int8_with_ct, published.polar_engine])
@pytest.mark.parametrize("bits", [3, 5, 8])
def test_known_codebooks_are_told_from_their_roundings(
    pristine: Path, tmp_path: Path, codebook: Callable[[int], torch.Tensor], layout: Layout, bits: int
) -> None:
    model = published_model(pristine, bits, ("lm_head", "*.in_proj")).with_codebook(codebook)
    assert_reads(model.write(tmp_path / "model", layout), model)


def test_any_other_stored_codebook_is_kept(pristine: Path, tmp_path: Path) -> None:
    def stretched(bits: int) -> torch.Tensor:
        return published_codebook(bits) * (1 + 2e-6)

    model = published_model(pristine, 5, ("lm_head",)).with_codebook(stretched)
    assert_reads(model.write(tmp_path / "ct", published.int8_with_ct), model)
    scaled = read_all(model.write(tmp_path / "scaled", published.q5))["lm_head"].codebook
    assert scaled is not None and not torch.equal(scaled, published_codebook(5))
    torch.testing.assert_close(scaled, stretched(5), rtol=2e-7, atol=0)


@pytest.mark.parametrize("layout", [published.polar_engine, published.int8, published.hlwq], ids=id_of)
def test_every_matrix_has_its_own_bits(pristine: Path, tmp_path: Path, layout: Layout) -> None:
    model = published_model(pristine, published.MIXED)
    assert_reads(model.write(tmp_path / "model", layout), model)
    checkpoint = HuggingFaceCheckpoint.open(tmp_path / "model")
    assert checkpoint.expert_bits == (ExpertBits(3, 4),) * 2
    bits = {name: stored.bits for name, stored in checkpoint.dense_stored.items() if stored.bits}
    assert bits == {
        f"{name}.weight": matrix.bits for name, matrix in model.matrices.items() if ".experts." not in name
    }
    if layout is published.polar_engine:
        assert checkpoint.layouts.keys() == {"nibbles", "Q5 packed", "int8"}


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize("layout", [published.q5, published.hlwq, published.double_underscore], ids=id_of)
def test_parts_lie_in_different_shards(
    five: PublishedModel, tmp_path: Path, layout: Layout, index: bool
) -> None:
    assert_reads(five.write_shards(tmp_path / "model", layout, index=index), five)


@pytest.mark.parametrize("layout", [published.q5, published.hlwq, published.all_underscores], ids=id_of)
def test_reads_the_names_transformers_has_in_memory(
    five: PublishedModel, tmp_path: Path, layout: Layout
) -> None:
    def renamed(name: str, matrix: Codes) -> published.Arrays:
        return layout(name.replace("backbone.", "model."), matrix)

    assert_reads(five.write(tmp_path / "model", renamed), five)


def test_dense_matrices_alone(pristine: Path, tmp_path: Path) -> None:
    """The experts stay plain, here stacked as transformers has them in memory."""
    model = published_model(pristine, 5, ("*.in_proj", "lm_head", "*.shared_experts.*"))
    for block in (1, 3):
        for matrix in ("up_proj", "down_proj"):
            prefix = f"backbone.layers.{block}.mixer.experts."
            experts = [model.plain.pop(f"{prefix}{expert}.{matrix}.weight") for expert in range(8)]
            model.plain[prefix + matrix] = torch.stack(experts)
    assert_reads(model.write(tmp_path / "model", published.q5), model)
    assert HuggingFaceCheckpoint.open(tmp_path / "model").expert_bits == (None, None)


def test_what_cannot_be_used_packed_is_decoded(pristine: Path, tmp_path: Path) -> None:
    """Embeddings are looked up by row, and routers need their digits: they come out in BF16."""
    model = published_model(pristine, 6, ("*.embeddings", "*.gate"))
    checkpoint = HuggingFaceCheckpoint.open(model.write(tmp_path / "model", published.int8))
    for name, written in model.matrices.items():
        decoded, stored = checkpoint.dense_matrix(name + ".weight"), checkpoint.dense_stored[name + ".weight"]
        assert isinstance(decoded, torch.Tensor) and decoded.dtype == torch.bfloat16
        assert (stored.dtype, stored.bits, stored.shape) == ("BF16", None, tuple(decoded.shape))
        assert relative_error(decoded, written.decode()) < 2**-9


def test_experts_of_fewer_bits_come_out_as_wide_as_their_layer(pristine: Path, tmp_path: Path) -> None:
    widths = {"*.1.mixer.experts.3.*": 2, "*.1.mixer.experts.5.up_proj": 6, "*.experts.*": 4}
    model = published_model(pristine, widths)
    checkpoint = HuggingFaceCheckpoint.open(model.write(tmp_path / "model", published.int8))
    assert checkpoint.expert_bits == (ExpertBits(6, 4), ExpertBits(4, 4))
    for projection, found in zip(("up_proj", "down_proj"), checkpoint.expert(ExpertKey(0, 3)), strict=True):
        written = model.matrices[f"backbone.layers.1.mixer.experts.3.{projection}"]
        assert isinstance(found, PackedMatrix) and found.codebook is not None
        assert np.array_equal(found.codes().numpy(), written.codes)
        assert found.codebook.numel() == 1 << found.bits and bool(torch.isfinite(found.codebook).all())
        assert np.array_equal(found.codebook[:4].numpy(), written.codebook)
        assert bool((found.codebook.diff() > 0).all())
        assert relative_error(found.decode(), written.decode()) < 1e-5


def test_experts_with_one_projection_quantized(pristine: Path, tmp_path: Path) -> None:
    model = published_model(pristine, 3, ("*.1.mixer.experts.*.up_proj",))
    checkpoint = HuggingFaceCheckpoint.open(model.write(tmp_path / "model", published.nibbles))
    assert checkpoint.expert_bits == (ExpertBits(3, 16), None)
    up, down = checkpoint.expert(ExpertKey(0, 2))
    assert isinstance(up, PackedMatrix) and isinstance(down, torch.Tensor)


@pytest.mark.parametrize("content", [{}, {"format": "polar_engine_v5", "layers": None}, {"layers": {}}])
def test_polar_config_may_say_nothing(
    five: PublishedModel, tmp_path: Path, content: dict[str, object]
) -> None:
    five.write(tmp_path / "model", published.double_underscore)
    (tmp_path / "model" / "polar_config.json").write_text(json.dumps(content))
    assert_reads(tmp_path / "model", five)


def test_format_strings_are_not_trusted(pristine: Path, tmp_path: Path) -> None:
    """Layouts are told from tensors, and so are bits wherever a codebook or packed bytes tell them."""
    model = published_model(pristine, published.MIXED)
    model.write(tmp_path / "model", published.polar_engine)
    with edited_json(tmp_path / "model" / "polar_config.json") as config:
        config["format"] = "hlwq-q3"
        for layer in config["layers"].values():
            layer |= {"packed": not layer["packed"], "packed_q5": not layer["packed_q5"], "bits": 2}
    assert_reads(tmp_path / "model", model)


def test_bits_that_only_polar_config_tells(pristine: Path, tmp_path: Path) -> None:
    """Codes of five bits that happen to be small: the largest one would be misleading."""
    model = published_model(pristine, 5, (IN_PROJ,))
    small = dataclasses.replace(model.matrices[IN_PROJ], codes=model.matrices[IN_PROJ].codes % 16)
    model = dataclasses.replace(model, matrices={IN_PROJ: small})
    model.write(tmp_path / "model", published.double_underscore)
    entry = model.polar_config()["layers"][IN_PROJ]
    underscored = IN_PROJ.replace("backbone.", "model.").replace(".", "__")
    for content in (
        {"layers": {IN_PROJ: entry}},
        {"layers": {f"{IN_PROJ}.weight": entry}},
        {"layers": {underscored: entry}},
        {"bits": 5},
        {"bits": 3, "layers": {IN_PROJ: {"bits": 5}}},
    ):
        (tmp_path / "model" / "polar_config.json").write_text(json.dumps(content))
        assert_reads(tmp_path / "model", model)


def test_headers_tell_bits_without_reading(five: PublishedModel, tmp_path: Path) -> None:
    """Codes that cannot be right do not matter before they are read."""
    model = dataclasses.replace(
        five,
        matrices={
            name: dataclasses.replace(matrix, codes=matrix.codes * 0 + 99)
            for name, matrix in five.matrices.items()
        },
    )
    checkpoint = HuggingFaceCheckpoint.open(model.write(tmp_path / "model", published.int8))
    assert checkpoint.expert_bits == (ExpertBits(5, 5),) * 2
    assert checkpoint.dense_stored[IN_PROJ + ".weight"].bits == 5


def test_sizes_are_those_on_disk(five: PublishedModel, tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint.open(five.write(tmp_path / "model", published.hlwq))
    total = checkpoint.routed_bytes + sum(stored.size for stored in checkpoint.dense_stored.values())
    written = {name: tensor.nbytes for name, tensor in five.tensors(published.hlwq).items()}
    assert total == sum(written.values()) == sum(checkpoint.sizes.values())
    assert checkpoint.routed_bytes == sum(size for name, size in written.items() if ".experts." in name)


def test_identity_changes_with_polar_config(five: PublishedModel, tmp_path: Path) -> None:
    """It may tell how many bits codes have."""
    five.write(tmp_path / "model", published.q5)
    before = HuggingFaceCheckpoint.open(tmp_path / "model").identity
    assert HuggingFaceCheckpoint.open(tmp_path / "model").identity == before
    (tmp_path / "model" / "polar_config.json").write_text("{}")
    assert HuggingFaceCheckpoint.open(tmp_path / "model").identity != before
