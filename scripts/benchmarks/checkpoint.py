"""A packed checkpoint with records of the 30B model's size, made of random weights and packed for real."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from common.checkpoint import HuggingFaceCheckpoint, PackedCheckpoint
from common.checkpoint.names import dense_shapes
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.model_config import ModelConfig

HIDDEN, INTERMEDIATE = 2688, 1856  # Nemotron-Cascade-2-30B-A3B
EXPERTS = 48


@contextmanager
def packed_checkpoint() -> Iterator[PackedCheckpoint]:
    """One layer of EXPERTS experts at 5 bits; removed afterwards."""
    with TemporaryDirectory() as directory:
        source = Path(directory) / "source"
        source.mkdir()
        config = _config()
        (source / "config.json").write_text(json.dumps(config))
        save_file(_tensors(ModelConfig.from_dict(config)), source / "model.safetensors")
        destination = Path(directory) / "packed"
        checkpoint = HuggingFaceCheckpoint.open(source)
        yield pack(checkpoint, destination, make_plan(checkpoint, 5), lambda done, total: None)


def _config() -> dict[str, object]:
    return {
        "architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "E", "vocab_size": 64,
        "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 6, "moe_shared_expert_intermediate_size": 128, "max_position_embeddings": 128,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 1, "mamba_num_heads": 1,
        "mamba_head_dim": 1, "ssm_state_size": 1, "n_groups": 1, "conv_kernel": 4,
    }  # fmt: skip


def _tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in dense_shapes(config).items()}
    for expert in range(EXPERTS):
        prefix = f"backbone.layers.0.mixer.experts.{expert}."
        tensors[prefix + "up_proj.weight"] = torch.randn(INTERMEDIATE, HIDDEN, dtype=torch.bfloat16) * 0.02
        tensors[prefix + "down_proj.weight"] = torch.randn(HIDDEN, INTERMEDIATE, dtype=torch.bfloat16) * 0.02
    return tensors
