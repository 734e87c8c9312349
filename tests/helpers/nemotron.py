"""Random NemotronH models in memory: transformers' own beside ours, on the same weights.

Weights are drawn so that mistakes show: every bias, decay, skip, norm and router correction differs from its
neutral value, and matrices keep the residual stream near unit size, so that logits are far apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from common.model_config import ModelConfig
from gpu_worker.model.nemotron_h import NemotronH
from gpu_worker.model.states import StatePools
from gpu_worker.model.weights import build_weights
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
        return StatePools(self.config, sequences, max_context, self.model.weights.lm_head.dtype)

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
    _randomise(reference, torch.Generator().manual_seed(seed))
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


@torch.no_grad()
def _randomise(model: NemotronHForCausalLM, generator: torch.Generator) -> None:
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
            tensor.copy_(1 + 0.3 * noise)
        elif name.endswith("A_log"):
            tensor.copy_(noise)
        elif name.endswith("dt_bias"):
            tensor.copy_(noise - 3)  # around softplus^-1(0.05)
        elif name.endswith("e_score_correction_bias"):
            tensor.copy_(0.2 * noise)
        elif name.endswith(("embeddings.weight", "conv1d.bias")):
            tensor.copy_(noise)
        else:
            tensor.copy_(noise / math.sqrt(tensor.shape[-1]))
