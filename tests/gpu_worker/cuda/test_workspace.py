"""The memory that a chunk is said to take: what it takes on a GPU, and what that means for the 30B."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.model_config import ModelConfig
from expert_store.synth.shapes import NEMOTRON_30B, config_json
from gpu_worker.cuda.workspace import prompt_workspace
from gpu_worker.engine import prefill_chunk
from gpu_worker.slots.fetch import Fetcher
from tests.helpers.device_engines import engine_of
from tests.helpers.engines import full_arena
from tests.helpers.synth import make_synthetic

SHAPE: dict[str, Any] = {
    "hidden_size": 1024, "max_position_embeddings": 8192, "num_attention_heads": 16, "head_dim": 64,
    "mamba_num_heads": 32, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "chunk_size": 128,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512,
    "moe_shared_expert_intermediate_size": 1024,
}  # fmt: skip


def test_a_chunk_of_the_30b_takes_half_a_gigabyte() -> None:
    config = ModelConfig.from_dict(config_json(NEMOTRON_30B))
    sizes = [prompt_workspace(config, tokens, torch.bfloat16) for tokens in (128, 1024, 4096)]
    assert sizes == sorted(sizes)
    assert sizes[-1] < 0.5e9 and prefill_chunk(torch.device("cuda")) == 4096


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["M", "ME", "E", "*E"])
def test_no_chunk_takes_more(tmp_path: Path, device: torch.device, pattern: str) -> None:
    """Whichever kind of block is the largest."""
    if device.type != "cuda":
        pytest.skip("the allocator of a GPU is watched")
    checkpoint = make_synthetic(tmp_path / "model", pattern=pattern + "E", dense_bits=5, **SHAPE)
    with (
        full_arena(checkpoint) as link,
        engine_of(checkpoint, Fetcher(link), 4, device, dtype=torch.bfloat16) as engine,  # type: ignore[arg-type]
    ):
        tokens = [(7 * i * i) % 512 for i in range(engine.prefill_chunk)]
        for _ in range(2):  # the first run makes libraries' workspaces, too
            place = engine.take_place()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            engine.prefill(place, tokens)
            engine.prefill(place, tokens)
            taken = torch.cuda.max_memory_allocated() - before
            engine.give_place(place)
    expected = prompt_workspace(checkpoint.config, len(tokens), torch.bfloat16)
    assert 0.5 * expected < taken <= expected
