"""Dense weights: everything but the routed experts, taken from canonical tensor names into typed blocks.

Names are the published ones (`backbone.layers.N.mixer.in_proj.weight`). Weights are cast to the compute dtype
once, here; what decides recurrences and routing stays float32. Shapes are checked against the config, so that
nothing later has to. Not done here: reading files, renaming, routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.errors import CheckpointError
from common.model_config import ATTENTION, MAMBA, MLP, MOE, ModelConfig


@dataclass(frozen=True)
class Mamba2Weights:
    in_proj: Tensor  # (intermediate + conv_dim + heads, hidden): gate, convolution inputs, dt
    conv1d_weight: Tensor  # (conv_dim, conv_kernel)
    conv1d_bias: Tensor | None  # (conv_dim,)
    dt_bias: Tensor  # (heads,) float32
    A: Tensor  # (heads,) float32, -exp(A_log)
    D: Tensor  # (heads,) float32
    norm: Tensor  # (intermediate,)
    out_proj: Tensor  # (hidden, intermediate)


@dataclass(frozen=True)
class AttentionWeights:
    q_proj: Tensor  # (heads * head_dim, hidden)
    k_proj: Tensor  # (kv heads * head_dim, hidden)
    v_proj: Tensor  # (kv heads * head_dim, hidden)
    o_proj: Tensor  # (hidden, heads * head_dim)


@dataclass(frozen=True)
class MLPWeights:
    up_proj: Tensor  # (intermediate, hidden)
    down_proj: Tensor  # (hidden, intermediate)


@dataclass(frozen=True)
class RouterWeights:
    weight: Tensor  # (experts, hidden) float32
    e_score_correction_bias: Tensor  # (experts,) float32


@dataclass(frozen=True)
class MoEWeights:
    gate: RouterWeights
    shared_experts: MLPWeights


MixerWeights = Mamba2Weights | AttentionWeights | MLPWeights | MoEWeights


@dataclass(frozen=True)
class BlockWeights:
    norm: Tensor  # (hidden,)
    mixer: MixerWeights


@dataclass(frozen=True)
class ModelWeights:
    embeddings: Tensor  # (vocab, hidden)
    blocks: tuple[BlockWeights, ...]
    norm_f: Tensor  # (hidden,)
    lm_head: Tensor  # (vocab, hidden)
    nbytes: int  # of all of them together


def build_weights(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ModelWeights:
    """Every dense weight on `device`; CheckpointError names what is missing, misshapen or unknown."""
    source = _Source(tensors, dtype, torch.device(device))
    hidden = config.hidden_size
    weights = ModelWeights(
        embeddings=source.take("backbone.embeddings.weight", config.vocab_size, hidden),
        blocks=tuple(_block(source, config, index) for index in range(len(config.pattern))),
        norm_f=source.take("backbone.norm_f.weight", hidden),
        lm_head=source.take("lm_head.weight", config.vocab_size, hidden),
        nbytes=0,
    )
    source.check_all_taken()
    return replace(weights, nbytes=source.nbytes)


class _Source:
    """Hands tensors out by name, checked and cast, and remembers which ones."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.tensors, self.dtype, self.device = tensors, dtype, device
        self.taken: set[str] = set()
        self.nbytes = 0

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"tensor {name!r} is missing")
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"tensor {name!r} has shape {tuple(tensor.shape)}, its config says {shape}")
        self.taken.add(name)
        placed = tensor.to(self.device, dtype or self.dtype)
        self.nbytes += placed.nbytes
        return placed

    def check_all_taken(self) -> None:
        """A backbone tensor that nobody asked for means another architecture: outputs would be wrong."""
        unknown = sorted(
            name for name in self.tensors if name not in self.taken and name.startswith("backbone.")
        )
        if unknown:
            raise CheckpointError(
                f"{len(unknown)} tensors have no place in this model, such as {unknown[0]!r}"
            )


def _block(source: _Source, config: ModelConfig, index: int) -> BlockWeights:
    prefix = f"backbone.layers.{index}."
    mixer = _MIXERS[config.pattern[index]](source, config, prefix + "mixer.")
    return BlockWeights(source.take(prefix + "norm.weight", config.hidden_size), mixer)


def _mamba2(source: _Source, config: ModelConfig, prefix: str) -> Mamba2Weights:
    heads, inner, channels = config.mamba_num_heads, config.mamba_intermediate_size, config.conv_dim
    conv1d = source.take(prefix + "conv1d.weight", channels, 1, config.conv_kernel)
    A_log, D, dt_bias = (
        source.take(prefix + name, heads, dtype=torch.float32) for name in ("A_log", "D", "dt_bias")
    )
    return Mamba2Weights(
        in_proj=source.take(prefix + "in_proj.weight", inner + channels + heads, config.hidden_size),
        conv1d_weight=conv1d.squeeze(1),
        conv1d_bias=source.take(prefix + "conv1d.bias", channels) if config.use_conv_bias else None,
        dt_bias=dt_bias,
        A=-A_log.exp(),
        D=D,
        norm=source.take(prefix + "norm.weight", inner),
        out_proj=source.take(prefix + "out_proj.weight", config.hidden_size, inner),
    )


def _attention(source: _Source, config: ModelConfig, prefix: str) -> AttentionWeights:
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return AttentionWeights(
        q_proj=source.take(prefix + "q_proj.weight", queries, hidden),
        k_proj=source.take(prefix + "k_proj.weight", kv, hidden),
        v_proj=source.take(prefix + "v_proj.weight", kv, hidden),
        o_proj=source.take(prefix + "o_proj.weight", hidden, queries),
    )


def _mlp(source: _Source, config: ModelConfig, prefix: str, intermediate: int | None = None) -> MLPWeights:
    hidden, intermediate = config.hidden_size, intermediate or config.intermediate_size
    return MLPWeights(
        up_proj=source.take(prefix + "up_proj.weight", intermediate, hidden),
        down_proj=source.take(prefix + "down_proj.weight", hidden, intermediate),
    )


def _moe(source: _Source, config: ModelConfig, prefix: str) -> MoEWeights:
    experts, bias = config.n_routed_experts, prefix + "gate.e_score_correction_bias"
    gate = RouterWeights(
        weight=source.take(prefix + "gate.weight", experts, config.hidden_size, dtype=torch.float32),
        e_score_correction_bias=source.take(bias, experts, dtype=torch.float32),
    )
    shared = config.moe_shared_expert_intermediate_size
    return MoEWeights(gate, _mlp(source, config, prefix + "shared_experts.", shared))


_MIXERS: dict[str, Callable[[_Source, ModelConfig, str], MixerWeights]] = {
    MAMBA: _mamba2, ATTENTION: _attention, MLP: _mlp, MOE: _moe,
}  # fmt: skip
