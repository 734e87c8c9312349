"""Dense weights: everything but the routed experts, taken from canonical tensor names into typed blocks.

Names are the published ones (`backbone.layers.N.mixer.in_proj.weight`). Weights are cast to the compute dtype
once, here; what decides recurrences and routing stays float32, and packed matrices stay packed. Shapes are
checked against the config, so that nothing later has to. Not done here: reading files, renaming, routed
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint.names import dense_shapes, packable_dense
from common.checkpoint.source import Matrix
from common.errors import CheckpointError
from common.hlwq.matrix import PackedMatrix
from common.model_config import ATTENTION, MAMBA, MLP, MOE, ModelConfig
from gpu_worker.model.linear import Linear


@dataclass(frozen=True)
class Mamba2Weights:
    in_proj: Linear  # (intermediate + conv_dim + heads, hidden): gate, convolution inputs, dt
    conv1d_weight: Tensor  # (conv_dim, conv_kernel)
    conv1d_bias: Tensor | None  # (conv_dim,)
    dt_bias: Tensor  # (heads,) float32
    A: Tensor  # (heads,) float32, -exp(A_log)
    D: Tensor  # (heads,) float32
    norm: Tensor  # (intermediate,)
    out_proj: Linear  # (hidden, intermediate)


@dataclass(frozen=True)
class AttentionWeights:
    q_proj: Linear  # (heads * head_dim, hidden)
    k_proj: Linear  # (kv heads * head_dim, hidden)
    v_proj: Linear  # (kv heads * head_dim, hidden)
    o_proj: Linear  # (hidden, heads * head_dim)


@dataclass(frozen=True)
class MLPWeights:
    up_proj: Linear  # (intermediate, hidden)
    down_proj: Linear  # (hidden, intermediate)


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
    embeddings: Tensor  # (vocab, hidden), as stored; page-locked on the host where the rest is on a GPU
    blocks: tuple[BlockWeights, ...]
    norm_f: Tensor  # (hidden,)
    lm_head: Linear  # (vocab, hidden)
    nbytes: int  # of all on the device together

    def embedded(self, tokens: Tensor) -> Tensor:
        """tokens (rows,) int64 to (rows, hidden) in the compute dtype."""
        dtype = self.norm_f.dtype
        if tokens.device == self.embeddings.device:
            return F.embedding(tokens, self.embeddings).to(dtype)
        from gpu_worker.cuda.kernels.embedding import embedding  # Triton is for those who have a GPU

        return embedding(tokens, self.embeddings, dtype)


def build_weights(
    tensors: Mapping[str, Matrix],
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ModelWeights:
    """Every dense weight on `device`; CheckpointError names what is missing, misshapen or unknown."""
    _check(tensors, config)
    source = _Source(tensors, dtype, torch.device(device))
    weights = ModelWeights(
        embeddings=source.looked_up("backbone.embeddings.weight"),
        blocks=tuple(_block(source, config, index) for index in range(len(config.pattern))),
        norm_f=source.tensor("backbone.norm_f.weight"),
        lm_head=source.linear("lm_head.weight"),
        nbytes=0,
    )
    return replace(weights, nbytes=source.nbytes)


def _check(tensors: Mapping[str, Matrix], config: ModelConfig) -> None:
    shapes, packable = dense_shapes(config), packable_dense(config)
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name!r} is missing")
        if tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape)
            raise CheckpointError(f"tensor {name!r} has shape {found}, its config says {shape}")
        if isinstance(tensors[name], PackedMatrix) and name not in packable:
            raise CheckpointError(f"tensor {name!r} cannot be used packed")
    # A backbone tensor that nobody asked for means another architecture: outputs would be wrong.
    unknown = sorted(name for name in tensors if name not in shapes and name.startswith("backbone."))
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors have no place in this model, such as {unknown[0]!r}")


class _Source:
    """Hands tensors out by name, placed and cast, and counts their bytes."""

    def __init__(self, tensors: Mapping[str, Matrix], dtype: torch.dtype, device: torch.device) -> None:
        self.tensors, self.dtype, self.device = tensors, dtype, device
        self.nbytes = 0

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        found = self.tensors[name]
        assert isinstance(found, Tensor)
        placed = found.to(self.device, dtype or self.dtype)
        self.nbytes += placed.nbytes
        return placed

    def looked_up(self, name: str) -> Tensor:
        """Uncast, and left on the host: rows are looked up, so the few that are needed can come then."""
        found = self.tensors[name]
        assert isinstance(found, Tensor)
        if self.device.type == "cuda" and not found.is_cuda:
            return found.pin_memory()
        self.nbytes += found.nbytes
        return found

    def linear(self, name: str) -> Linear:
        linear = Linear.of(self.tensors[name], self.dtype, self.device)
        self.nbytes += linear.nbytes
        return linear


def _block(source: _Source, config: ModelConfig, index: int) -> BlockWeights:
    prefix = f"backbone.layers.{index}."
    mixer = _MIXERS[config.pattern[index]](source, config, prefix + "mixer.")
    return BlockWeights(source.tensor(prefix + "norm.weight"), mixer)


def _mamba2(source: _Source, config: ModelConfig, prefix: str) -> Mamba2Weights:
    A_log, D, dt_bias = (source.tensor(prefix + name, torch.float32) for name in ("A_log", "D", "dt_bias"))
    return Mamba2Weights(
        in_proj=source.linear(prefix + "in_proj.weight"),
        conv1d_weight=source.tensor(prefix + "conv1d.weight").squeeze(1),
        conv1d_bias=source.tensor(prefix + "conv1d.bias") if config.use_conv_bias else None,
        dt_bias=dt_bias,
        A=-A_log.exp(),
        D=D,
        norm=source.tensor(prefix + "norm.weight"),
        out_proj=source.linear(prefix + "out_proj.weight"),
    )


def _attention(source: _Source, config: ModelConfig, prefix: str) -> AttentionWeights:
    return AttentionWeights(
        q_proj=source.linear(prefix + "q_proj.weight"),
        k_proj=source.linear(prefix + "k_proj.weight"),
        v_proj=source.linear(prefix + "v_proj.weight"),
        o_proj=source.linear(prefix + "o_proj.weight"),
    )


def _mlp(source: _Source, config: ModelConfig, prefix: str) -> MLPWeights:
    return MLPWeights(
        up_proj=source.linear(prefix + "up_proj.weight"),
        down_proj=source.linear(prefix + "down_proj.weight"),
    )


def _moe(source: _Source, config: ModelConfig, prefix: str) -> MoEWeights:
    gate = RouterWeights(
        weight=source.tensor(prefix + "gate.weight", torch.float32),
        e_score_correction_bias=source.tensor(prefix + "gate.e_score_correction_bias", torch.float32),
    )
    return MoEWeights(gate, _mlp(source, config, prefix + "shared_experts."))


_MIXERS: dict[str, Callable[[_Source, ModelConfig, str], MixerWeights]] = {
    MAMBA: _mamba2, ATTENTION: _attention, MLP: _mlp, MOE: _moe,
}  # fmt: skip
