"""Synthetic models of the 30B's blocks at tiny widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.checkpoint import PackedCheckpoint
from expert_store.synth.shapes import NEMOTRON_30B, config_json
from expert_store.synth.source import Synthesis, synthesize

TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "max_position_embeddings": 1024, "num_attention_heads": 8,
    "head_dim": 32, "intermediate_size": 200, "mamba_num_heads": 8, "mamba_head_dim": 32,
    "ssm_state_size": 32, "n_groups": 4, "chunk_size": 32, "n_routed_experts": 16, "num_experts_per_tok": 3,
    "moe_intermediate_size": 200, "moe_shared_expert_intermediate_size": 384,
}  # fmt: skip


def tiny_synthesis(
    pattern: str | None = "MEM*E",
    bits: int = 5,
    dense_bits: int = 16,
    seed: int = 0,
    skew: float = 0.0,
    **overrides: Any,
) -> Synthesis:
    """What makes a small model; `pattern` None: all 52 blocks."""
    config = config_json(NEMOTRON_30B, pattern=pattern) | TINY | overrides
    return Synthesis(NEMOTRON_30B, config, bits, dense_bits, seed, skew)


def make_synthetic(destination: Path, *args: Any, **options: Any) -> PackedCheckpoint:
    """`tiny_synthesis(*args, **options)` written, without a progress bar."""
    return synthesize(tiny_synthesis(*args, **options), destination, lambda done, total: None)
