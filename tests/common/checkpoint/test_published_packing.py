"""From published layouts to packed checkpoints and to logits: no code is ever quantized again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import NemotronHForCausalLM

from common.checkpoint import HuggingFaceCheckpoint, PackedCheckpoint, open_checkpoint
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.checkpoint.source import WeightSource
from common.expert_key import ExpertKey
from common.hlwq.codebook import packing_codebook
from common.hlwq.matrix import PackedMatrix
from common.record import ExpertBits
from tests.helpers import published
from tests.helpers.engines import full_arena, load, prompt_logits
from tests.helpers.nemotron import relative_error
from tests.helpers.published import Codes, Layout, PublishedModel, assert_same, published_model

TOKENS = [5, 17, 80, 3, 42, 90, 11, 2, 64, 33, 8, 71, 50, 19, 26, 1, 9, 77, 30, 12]
SAME_CODES = {
    3: [*published.ANY_BITS, published.nibbles],
    4: [published.int8, published.nibbles, published.hlwq, published.double_underscore],
    5: [*published.ANY_BITS, published.q5],
}


def packed(directory: Path, destination: Path, bits: int | None = None) -> PackedCheckpoint:
    source = open_checkpoint(directory)
    return pack(source, destination, make_plan(source, bits), lambda done, total: None, "tiny")


def experts_of(source: WeightSource) -> Iterator[tuple[str, object]]:
    """Every routed matrix with its name, without `.weight`."""
    for layer, block in enumerate((1, 3)):
        for expert in range(8):
            for projection, matrix in zip(
                ("up_proj", "down_proj"), source.expert(ExpertKey(layer, expert)), strict=True
            ):
                yield f"backbone.layers.{block}.mixer.experts.{expert}.{projection}", matrix


def assert_carried_over(checkpoint: PackedCheckpoint, model: PublishedModel) -> None:
    assert checkpoint.manifest.codebook == "source"
    for name, matrix in experts_of(checkpoint):
        assert_same(matrix, model.matrices[name])
    dense = {name: written for name, written in model.matrices.items() if ".experts." not in name}
    assert {name.removesuffix(".weight") for name in checkpoint.plan.dense} == dense.keys()
    for name, written in dense.items():
        assert_same(checkpoint.dense_matrix(name + ".weight"), written)


@pytest.mark.parametrize("bits", SAME_CODES)
def test_all_layouts_of_the_same_codes_pack_to_the_same_bytes(
    pristine: Path, tmp_path: Path, bits: int
) -> None:
    model = published_model(pristine, bits)
    fingerprints = set()
    for layout in SAME_CODES[bits]:
        directory = model.write(tmp_path / layout.__name__, layout)
        checkpoint = packed(directory, tmp_path / f"{layout.__name__}-packed")
        assert_carried_over(checkpoint, model)
        fingerprints.add(checkpoint.fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.parametrize("layout", [published.polar_engine, published.hlwq, published.double_underscore])
def test_mixed_bits_are_carried_over(pristine: Path, tmp_path: Path, layout: Layout) -> None:
    model = published_model(pristine, published.MIXED)
    checkpoint = packed(model.write(tmp_path / "model", layout), tmp_path / "packed")
    assert checkpoint.layout.bits == (ExpertBits(3, 4),) * 2
    assert_carried_over(checkpoint, model)


@pytest.mark.parametrize("layout", [published.int8, published.int8_with_ct, published.q5])
def test_own_codebooks_survive_being_published(pristine: Path, tmp_path: Path, layout: Layout) -> None:
    """Written out in a published layout and packed again, a packed checkpoint is the same, byte for byte."""
    first = packed(pristine, tmp_path / "first")
    model = published_model(pristine, 5, ())
    matrices = {}
    for name, matrix in experts_of(first):
        assert isinstance(matrix, PackedMatrix) and matrix.norms is not None and matrix.codebook is not None
        codes = [part.clone().numpy() for part in (matrix.codes(), matrix.norms, matrix.codebook)]
        matrices[name] = Codes(5, matrix.in_features, *codes)
        del model.plain[name + ".weight"]
    model.matrices.update(matrices)
    again = packed(model.write(tmp_path / "model", layout), tmp_path / "again")
    for layer in range(2):
        files = [path / f"experts-{layer:05d}.safetensors" for path in (first.directory, again.directory)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_some_experts_published_are_mixed(pristine: Path, tmp_path: Path) -> None:
    model = published_model(pristine, 5, ("*.experts.0.*",))
    source = HuggingFaceCheckpoint.open(model.write(tmp_path / "model", published.int8))
    checkpoint = pack(source, tmp_path / "packed", make_plan(source, 5), lambda done, total: None)
    assert checkpoint.manifest.codebook == "mixed"


def test_other_bits_are_quantized_anew(pristine: Path, tmp_path: Path) -> None:
    """Only those: the down projections already have the bits that are asked for."""
    model = published_model(pristine, {"*.experts.*.up_proj": 6, "*.experts.*.down_proj": 4})
    source = HuggingFaceCheckpoint.open(model.write(tmp_path / "model", published.int8))
    plan = make_plan(source, 4)
    checkpoint = pack(source, tmp_path / "packed", plan, lambda done, total: None)
    assert checkpoint.manifest.codebook == "mixed" and checkpoint.layout.bits == (ExpertBits(4, 4),) * 2
    for name, matrix in experts_of(checkpoint):
        assert isinstance(matrix, PackedMatrix) and matrix.codebook is not None
        if name.endswith("down_proj"):
            assert_same(matrix, model.matrices[name])
        else:
            assert torch.equal(matrix.codebook, packing_codebook(4))
            assert relative_error(matrix.decode(), model.matrices[name].decode()) < 0.11


def test_quantized_embeddings_become_plain(pristine: Path, tmp_path: Path) -> None:
    model = published_model(pristine, 6, ("*.embeddings", "*_proj"))
    checkpoint = packed(model.write(tmp_path / "model", published.hlwq), tmp_path / "packed")
    embeddings = checkpoint.dense_matrix("backbone.embeddings.weight")
    assert isinstance(embeddings, torch.Tensor) and embeddings.dtype == torch.bfloat16
    assert relative_error(embeddings, model.matrices["backbone.embeddings"].decode()) < 2**-9


def worker_logits(checkpoint: PackedCheckpoint) -> torch.Tensor:
    with full_arena(checkpoint) as link:
        return prompt_logits(load(link).engine, TOKENS)


def test_logits_are_those_of_the_decoded_weights(pristine: Path, tmp_path: Path) -> None:
    """transformers on weights decoded in NumPy, the worker on codes from every layout that can have them."""
    model = published_model(pristine, published.MIXED)
    reference = NemotronHForCausalLM.from_pretrained(
        model.write_decoded(tmp_path / "decoded"), dtype=torch.float32
    )
    with torch.inference_mode():
        expected = reference.eval()(torch.tensor([TOKENS])).logits[0]
    found = []
    for layout in (published.polar_engine, *published.ANY_BITS):
        directory = model.write(tmp_path / layout.__name__, layout)
        found.append(worker_logits(packed(directory, tmp_path / f"{layout.__name__}-packed")))
    assert relative_error(found[0], expected) < 1e-4
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_logits_with_an_expert_of_fewer_bits(pristine: Path, tmp_path: Path) -> None:
    model = published_model(pristine, {"*.experts.[0-3].*": 3, "*.experts.*": 5})
    reference = NemotronHForCausalLM.from_pretrained(
        model.write_decoded(tmp_path / "decoded"), dtype=torch.float32
    )
    with torch.inference_mode():
        expected = reference.eval()(torch.tensor([TOKENS])).logits[0]
    directory = model.write(tmp_path / "model", published.polar_engine)
    assert relative_error(worker_logits(packed(directory, tmp_path / "packed")), expected) < 1e-4
