"""Decode steps made of the GPU's kernels against the model as it is defined, over the same packed weights."""

from collections.abc import Iterator

import pytest
import torch

from common.checkpoint import PackedCheckpoint
from gpu_worker.config import WorkerConfig
from gpu_worker.cuda.decode_model import DecodeModel
from gpu_worker.cuda.device_slots import DeviceSlots
from gpu_worker.cuda.step_experts import ResolvedExperts
from gpu_worker.loading import ServedModel, load_model
from gpu_worker.model.states import StatePools
from gpu_worker.model.weights import build_weights
from tests.helpers.engines import NOWHERE, FixedLink, full_arena
from tests.helpers.synth import make_synthetic

SLOTS, ROWS, STEPS = 7, 2, 3
# Triton's interpreter takes milliseconds a program: few heads, few outputs.
SMALL = {
    "pattern": "ME*-E", "vocab_size": 128, "hidden_size": 128, "max_position_embeddings": 128,
    "num_attention_heads": 2, "num_key_value_heads": 1, "mamba_num_heads": 4, "n_groups": 2,
    "n_routed_experts": 12, "num_experts_per_tok": 2, "moe_shared_expert_intermediate_size": 200,
}  # fmt: skip


@pytest.fixture(scope="module", params=[5, 16], ids=["dense packed", "dense plain"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    directory = tmp_path_factory.mktemp("model") / "synthetic"
    return make_synthetic(directory, dense_bits=request.param, **SMALL)


@pytest.fixture(scope="module")
def link(checkpoint: PackedCheckpoint) -> Iterator[FixedLink]:
    with full_arena(checkpoint) as link:
        yield link


@pytest.fixture(scope="module")
def reference(checkpoint: PackedCheckpoint, link: FixedLink) -> ServedModel:
    """The CPU's engine in float32, straight from the arena."""
    config = WorkerConfig(NOWHERE, NOWHERE, device="cpu", dtype="float32")
    return load_model(config, link.attachment, link)


def decode_model(
    checkpoint: PackedCheckpoint, link: FixedLink, slots: int, dtype: torch.dtype, device: torch.device
) -> tuple[DecodeModel, ResolvedExperts]:
    config, layout = checkpoint.config, checkpoint.layout
    dense = {name: checkpoint.mapped_dense_matrix(name) for name in checkpoint.dense_stored}
    model = DecodeModel(config, build_weights(dense, config, dtype, device))
    pairs = ROWS * config.num_experts_per_tok
    cache = DeviceSlots(
        config.num_layers, config.n_routed_experts, slots, layout.stride, "lru", pairs, device
    )
    arena = link.attachment.arena
    frames = torch.from_numpy((arena.words >> 2 & 0x3FFFFFFF).astype("int32"))
    cache.attach(arena.frames.data_ptr(), frames)
    return model, ResolvedExperts(layout, cache, fetch_blocks=2)


@torch.inference_mode()
def test_the_same_logits_as_the_model(
    checkpoint: PackedCheckpoint, link: FixedLink, reference: ServedModel, device: torch.device
) -> None:
    model, experts = decode_model(checkpoint, link, SLOTS, torch.float32, device)
    expected_pools, pools = (StatePools(checkpoint.config, 3, 128, device=d) for d in ("cpu", device))
    places = torch.tensor([2, 0])
    for seed in range(STEPS):
        tokens = torch.tensor([17 * seed + 3, 29 * seed + 8])
        hidden = reference.engine.model.decode(tokens, places, expected_pools)
        expected = reference.engine.logits(hidden)
        logits = model(tokens.to(device), places.to(device), pools, experts)
        assert (logits.cpu() - expected).norm() < 1e-5 * expected.norm()
    experts.slots.check_integrity()
    assert pools.lengths.tolist() == [STEPS, 0, STEPS]
