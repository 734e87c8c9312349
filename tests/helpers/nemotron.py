"""Random NemotronH models in memory: transformers' own beside ours, on the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from common.model_config import ModelConfig
from gpu_worker.model.nemotron_h import NemotronH
from gpu_worker.model.states import StatePools
from gpu_worker.model.weights import build_weights
from tests.helpers.models import randomise
from tests.helpers.plain_experts import PlainExperts

SMALL: dict[str, Any] = {
    "hybrid_override_pattern": "ME*-ME", "vocab_size": 200, "hidden_size": 48, "max_position_embeddings": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 56,
    "mamba_num_heads": 6, "mamba_head_dim": 8, "ssm_state_size": 12, "n_groups": 2, "conv_kernel": 4,
    "chunk_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28, "routed_scaling_factor": 2.5,
}  # fmt: skip


@dataclass(frozen=True)
class Twins:
    """transformers' model, ours over plain experts, and what ours was built from."""

    reference: NemotronHForCausalLM
    model: NemotronH
    experts: PlainExperts
    config: ModelConfig
    dense: dict[str, Tensor]

    def pools(self, sequences: int = 1, max_context: int = 512) -> StatePools:
        return StatePools(self.config, sequences, max_context, self.model.weights.norm_f.dtype)

    def tokens(self, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.config.vocab_size, (count,), generator=generator)

    @torch.inference_mode()
    def reference_logits(self, tokens: Tensor) -> Tensor:
        """transformers' logits of one whole sequence: (t, vocab)."""
        return self.reference(tokens[None], use_cache=False).logits[0]

    def prefill_logits(self, tokens: Tensor) -> Tensor:
        """Ours, prefilled in one piece: (t, vocab)."""
        return self.model.logits(self.model.prefill(tokens, 0, self.pools()))


def make_twins(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Twins:
    """A random model of SMALL's shape with `overrides`; `dtype` is ours, the reference stays float32."""
    reference = NemotronHForCausalLM(NemotronHConfig(**(SMALL | overrides))).eval()
    randomise(reference, torch.Generator().manual_seed(seed))
    config = ModelConfig.from_dict(reference.config.to_dict())
    state = {
        name.replace("model.", "backbone.", 1): tensor for name, tensor in reference.state_dict().items()
    }
    ups, downs = (
        [tensor for name, tensor in state.items() if name.endswith(f"experts.{matrix}_proj")]
        for matrix in ("up", "down")
    )
    dense = {name: tensor for name, tensor in state.items() if ".mixer.experts." not in name}
    experts = PlainExperts(ups, downs)
    return Twins(
        reference, NemotronH(config, build_weights(dense, config, dtype), experts), experts, config, dense
    )


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
