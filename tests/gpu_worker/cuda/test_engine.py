"""The engine on a GPU, prompts and decode steps, against the CPU's over the same records.

Triton's interpreter takes milliseconds a program, so the model has few heads and few outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from common.checkpoint import PackedCheckpoint
from common.hlwq.matrix import PackedMatrix
from gpu_worker.config import WorkerConfig
from gpu_worker.cuda.engine import DeviceEngine
from gpu_worker.cuda.loading import device_engine
from gpu_worker.loading import load_model
from gpu_worker.model.states import StatePools
from gpu_worker.model.weights import build_weights
from gpu_worker.slots.fetch import Fetcher
from gpu_worker.slots.hints import Hints
from tests.helpers.engines import NOWHERE, FixedLink, full_arena, greedy
from tests.helpers.synth import make_synthetic

SHAPE: dict[str, Any] = {
    "pattern": "ME*-", "vocab_size": 128, "hidden_size": 128, "max_position_embeddings": 128,
    "num_attention_heads": 2, "num_key_value_heads": 1, "mamba_num_heads": 4, "n_groups": 2,
    "n_routed_experts": 12, "num_experts_per_tok": 2, "moe_shared_expert_intermediate_size": 200,
}  # fmt: skip
PROMPT = [(7 * i * i + 3 * i) % 128 for i in range(20)]
COUNT, ROWS = 4, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    """Dense matrices at five bits, but for the plain ones of shared experts."""
    directory = tmp_path_factory.mktemp("model") / "synthetic"
    return make_synthetic(directory, dense_bits=5, **SHAPE)


@pytest.fixture(scope="module")
def link(checkpoint: PackedCheckpoint) -> Iterator[FixedLink]:
    with full_arena(checkpoint) as link:
        yield link


@contextmanager
def engine_of(
    checkpoint: PackedCheckpoint, link: FixedLink, slots: int, device: torch.device, policy: str = "lru"
) -> Iterator[DeviceEngine]:
    """In float32; with captured steps where there is a GPU."""
    config, fetcher = checkpoint.config, Fetcher(link)  # type: ignore[arg-type]
    dense = {name: checkpoint.mapped_dense_matrix(name) for name in checkpoint.dense_stored}
    for name, matrix in dense.items():
        if "shared_experts" in name and isinstance(matrix, PackedMatrix):
            dense[name] = matrix.decode()
    weights = build_weights(dense, config, torch.float32, device)
    pools = StatePools(config, ROWS, config.max_position_embeddings, device=device)
    cache = slots, policy, device.type == "cpu"
    engine = device_engine(weights, pools, checkpoint.layout, *cache, fetcher, Hints("off", fetcher), config)
    yield engine
    engine.check_integrity()
    engine.close()


def test_the_cpu_generates_the_same(
    checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device
) -> None:
    """And whatever the slots, the policy and what the cache held before, every bit is the same."""
    cpu = load_model(WorkerConfig(NOWHERE, NOWHERE, device="cpu"), link.attachment, link).engine  # type: ignore[arg-type]
    expected_tokens, expected = greedy(cpu, PROMPT, COUNT)
    found = []
    for slots, policy, runs in ((4, "lru", 1), (7, "lfru", 2)):
        with engine_of(checkpoint, link, slots, device, policy) as engine:
            for _ in range(runs):
                tokens, logits = greedy(engine, PROMPT, COUNT)
                assert tokens == expected_tokens
                assert (logits.cpu() - expected).norm() < 1e-5 * expected.norm()
                found.append(logits)
            counters = engine.experts.counters
        assert counters.hits > 0 and counters.misses > 0
        assert counters.bytes_fetched == counters.misses * checkpoint.layout.stride
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_sequences_side_by_side_are_as_alone(
    checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device
) -> None:
    prompts = PROMPT[:3], PROMPT[5:9]
    with engine_of(checkpoint, link, 12, device) as engine:
        alone = [greedy(engine, prompt, 2) for prompt in prompts]
        places = [engine.take_place(), engine.take_place()]
        for place, prompt in zip(places, prompts, strict=True):
            engine.prefill(place, prompt)
        logits = engine.decode(places, [tokens[0] for tokens, _ in alone])
        for row, (_, expected) in zip(logits, alone, strict=True):
            assert (row - expected[1]).norm() < 1e-5 * expected[1].norm()
        for place in places:
            engine.give_place(place)
