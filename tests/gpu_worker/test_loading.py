"""Dense weights as the worker loads them: as they are stored, or packed while loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.checkpoint import PackedCheckpoint, open_checkpoint
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.errors import ConfigError
from common.hlwq.matrix import PackedMatrix
from gpu_worker.account import Sizes
from gpu_worker.loading import _dense
from gpu_worker.model.weights import MoEWeights, build_weights
from tests.helpers.engines import FixedLink, full_arena, load, prompt_logits
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.models import make_hf_model
from tests.helpers.nemotron import relative_error

PROMPT = [(7 * i * i + 3 * i) % 96 for i in range(40)]


def link_to(source: Path, destination: Path, dense_bits: int | None) -> Iterator[FixedLink]:
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, 5, dense_bits)
    with full_arena(pack(checkpoint, destination, plan, lambda done, total: None)) as link:
        yield link


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def plain(model: Path) -> Iterator[FixedLink]:
    """Dense weights in bfloat16."""
    yield from link_to(model, model.with_name("plain"), None)


@pytest.fixture(scope="module")
def packed(model: Path) -> Iterator[FixedLink]:
    """Dense matrices at 8 bits."""
    yield from link_to(model, model.with_name("packed"), 8)


def projections(engine) -> list[PackedMatrix]:
    moe = engine.model.blocks[1][0].mixer
    assert isinstance(moe, MoEWeights)
    shared = moe.shared_experts
    return [linear.weight for linear in (shared.up_proj, shared.down_proj, engine.model.weights.lm_head)]


def test_packing_while_loading_equals_packing_before(plain: FixedLink, packed: FixedLink) -> None:
    before, while_loading = load(packed).engine, load(plain, dense_bits=8).engine
    assert [matrix.bits for matrix in projections(while_loading)] == [8, 8, 8]
    for a, b in zip(projections(before), projections(while_loading), strict=True):
        assert torch.equal(a.codes(), b.codes()) and torch.equal(a.norms, b.norms)
    assert torch.equal(prompt_logits(before, PROMPT), prompt_logits(while_loading, PROMPT))


def test_fewer_bits_cost_accuracy_and_save_memory(plain: FixedLink) -> None:
    exact = load(plain).engine
    sizes, errors = [exact.model.weights.nbytes], []
    for bits in (8, 5, 3):
        engine = load(plain, dense_bits=bits).engine
        sizes.append(engine.model.weights.nbytes)
        pairs = zip(projections(engine), projections(exact), strict=True)
        errors.append(max(relative_error(ours.decode(), theirs.decode()) for ours, theirs in pairs))
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)
    assert errors[0] <= 0.007 and errors[1] <= 0.05


def test_sixteen_bits_unpack(packed: FixedLink) -> None:
    kept, engine = load(packed).engine, load(packed, dense_bits=16).engine
    assert [matrix.bits for matrix in projections(engine)] == [16, 16, 16]
    for a, b in zip(projections(kept), projections(engine), strict=True):
        assert torch.equal(a.decode(torch.bfloat16), b.decode(torch.bfloat16))


@pytest.mark.parametrize("bits", [None, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_account_comes_to_what_is_allocated(plain: FixedLink, bits: int | None, dtype: str) -> None:
    served = load(plain, dense_bits=bits, dtype=dtype, max_sequences=3, max_context=100)
    pools = served.engine.pools
    assert (pools.sequences, pools.max_context) == (3, served.account.context) == (3, 100)
    planned = {entry.purpose: entry.nbytes for entry in served.account.entries}
    assert planned["dense weights"] == served.engine.model.weights.nbytes
    assert planned["recurrent states"] + planned["keys and values"] == pools.nbytes


@pytest.mark.parametrize("bits", [None, 5])
def test_so_does_a_gpus_account(plain: FixedLink, bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = PackedCheckpoint.open(plain.attachment.checkpoint)
    memory, model, dtype = FakeCuda(8 << 30).replace(monkeypatch), checkpoint.config, torch.bfloat16
    sizes = Sizes(model, checkpoint.dense_stored, checkpoint.layout.stride, dtype, 1, memory)
    weights = build_weights(_dense(checkpoint, bits), model, dtype, "meta")
    assert sum(sizes.dense_tensors(bits)) == weights.nbytes - weights.embeddings.nbytes


def test_the_wrong_experts_are_refused_before_anything_is_loaded(plain: FixedLink) -> None:
    with pytest.raises(ConfigError, match=r"--expert-bits 16: .* experts of 5 bits"):
        load(plain, expert_bits=16)
    assert load(plain, expert_bits=5).account.slots is None


def test_what_is_stored_is_mapped_not_copied(packed: FixedLink) -> None:
    first, second = (projections(load(packed, dense_bits=bits).engine) for bits in (None, 8))
    files = Path("/proc/self/maps").read_text()
    assert str(packed.attachment.checkpoint / "dense.safetensors") in files
    assert [matrix.bits for matrix in first] == [matrix.bits for matrix in second] == [8, 8, 8]
