"""A decode step on the GPU: one token of each of a few sequences, as a fixed run of kernels.

The same model as `gpu_worker.model.nemotron_h`, with what lies between two products fused into one kernel:
a block is norm and rotation, product, what the block is about, rotation, product with the residual added.
Shapes depend on the number of rows alone and nothing waits for the device, so that the whole step can be
captured in a graph; `step_experts` says what becomes of that when experts must be asked for. Not done here:
prompts, sampling, capturing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.model_config import ModelConfig
from gpu_worker.cuda.branch import Branch
from gpu_worker.cuda.kernels import rotation
from gpu_worker.cuda.kernels.attention_decode import attention_decode
from gpu_worker.cuda.kernels.expert_products import combine
from gpu_worker.cuda.kernels.mamba2_step import mamba2_step
from gpu_worker.cuda.kernels.router import router, router_plain, usable
from gpu_worker.cuda.linear import Activations, StepLinear, StepMLP
from gpu_worker.cuda.step_experts import StepExperts
from gpu_worker.model.states import DecodeStep, StatePools
from gpu_worker.model.weights import (
    AttentionWeights,
    Mamba2Weights,
    MLPWeights,
    ModelWeights,
    MoEWeights,
)

# Adds a block's output to hidden (rows, hidden_size), in place.
Block = Callable[[Tensor, DecodeStep, StepExperts], None]


class DecodeModel:
    """The model's weights, prepared for decode steps; keeps no state of its own."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config, self.weights = config, weights
        self._dtype = weights.norm_f.dtype
        self._lm_head = StepLinear(weights.lm_head, self._dtype)
        self._blocks = _blocks(config, weights)

    def __call__(self, tokens: Tensor, places: Tensor, pools: StatePools, experts: StepExperts) -> Tensor:
        """The next token of each of b sequences: tokens, places (b,) int64 to logits (b, vocab) float32."""
        positions = pools.lengths.index_select(0, places)
        pools.lengths.index_copy_(0, places, positions + 1)
        step = DecodeStep(pools, places, positions, pools.max_context)
        hidden = self.weights.embedded(tokens)
        for block in self._blocks:
            block(hidden, step, experts)
        x = normed(hidden, self.weights.norm_f, self.config.layer_norm_epsilon)
        return self._lm_head(x, torch.float32)


def normed(hidden: Tensor, weight: Tensor, epsilon: float) -> Activations:
    """The norm before a block, in both forms: routers want plain activations, packed projections rotated."""
    return Activations(*rotation.rms_norm_rotate(hidden, weight, epsilon))


class _Mamba2Block:
    """The index-th Mamba-2 block."""

    def __init__(self, norm: Tensor, weights: Mamba2Weights, config: ModelConfig, index: int) -> None:
        self._norm, self._weights, self._config, self._index = norm, weights, config, index
        self._in_proj, self._out_proj = (
            StepLinear(w, norm.dtype) for w in (weights.in_proj, weights.out_proj)
        )
        fused = rotation.gated_norm_usable(config.mamba_intermediate_size, config.n_groups)
        self._gated_norm = rotation.gated_norm_rotate if fused else rotation.gated_norm_rotate_plain

    def __call__(self, hidden: Tensor, step: DecodeStep, experts: StepExperts) -> None:
        config, dtype = self._config, hidden.dtype
        conv, ssm = step.pools.conv[self._index], step.pools.ssm[self._index]
        projected = self._in_proj(normed(hidden, self._norm, config.layer_norm_epsilon), dtype)
        y = mamba2_step(projected, conv, ssm, step.sequences, self._weights, config)
        gate = projected[:, : config.mamba_intermediate_size]
        norm = self._weights.norm, config.n_groups, config.layer_norm_epsilon
        self._out_proj(Activations(*self._gated_norm(y, gate, *norm)), dtype, hidden)


class _AttentionBlock:
    """The index-th attention block."""

    def __init__(self, norm: Tensor, weights: AttentionWeights, config: ModelConfig, index: int) -> None:
        self._norm, self._config, self._index = norm, config, index
        self._projections = [
            StepLinear(w, norm.dtype) for w in (weights.q_proj, weights.k_proj, weights.v_proj)
        ]
        self._o_proj = StepLinear(weights.o_proj, norm.dtype)

    def __call__(self, hidden: Tensor, step: DecodeStep, experts: StepExperts) -> None:
        x = normed(hidden, self._norm, self._config.layer_norm_epsilon)
        q, k, v = (
            proj(x, hidden.dtype).unflatten(1, (-1, self._config.head_dim)) for proj in self._projections
        )
        keys, values = step.pools.keys[self._index], step.pools.values[self._index]
        y = attention_decode(q, k, v, keys, values, step.sequences, step.positions)
        self._o_proj(Activations(y, rotation.rotate(y)), hidden.dtype, hidden)


class _MLPBlock:
    def __init__(self, norm: Tensor, weights: MLPWeights, config: ModelConfig) -> None:
        self._norm, self._epsilon, self._mlp = norm, config.layer_norm_epsilon, StepMLP(weights, norm.dtype)

    def __call__(self, hidden: Tensor, step: DecodeStep, experts: StepExperts) -> None:
        self._mlp(normed(hidden, self._norm, self._epsilon), hidden.dtype, hidden)


class _MoEBlock:
    """The MoE block of `layer`; its shared expert is computed beside routing, look-up and fetching."""

    def __init__(
        self, norm: Tensor, weights: MoEWeights, config: ModelConfig, layer: int, branch: Branch
    ) -> None:
        self._norm, self._gate, self._config, self._layer = norm, weights.gate, config, layer
        self._shared = StepMLP(weights.shared_experts, norm.dtype)
        self._branch = branch
        self._router = router if usable(config) else router_plain

    def __call__(self, hidden: Tensor, step: DecodeStep, experts: StepExperts) -> None:
        x = normed(hidden, self._norm, self._config.layer_norm_epsilon)
        assert x.plain is not None
        with self._branch.beside():
            shared = self._shared(x, torch.float32)
        choices = hidden.new_empty(hidden.shape[0], self._config.num_experts_per_tok, dtype=torch.int64)
        weights = torch.empty_like(choices, dtype=torch.float32)
        gate = self._gate.weight, self._gate.e_score_correction_bias
        self._router(x.plain, *gate, self._config, choices, weights)
        products = experts.products(self._layer, x, choices)
        self._branch.join()
        combine(products, weights, shared, hidden)


def _blocks(config: ModelConfig, weights: ModelWeights) -> list[Block]:
    """The blocks in order; each kind counts its own, because pools and layers are indexed that way."""
    blocks: list[Block] = []
    branch = Branch(weights.norm_f.device)
    for number, block in enumerate(weights.blocks):
        index = config.pattern[:number].count(config.pattern[number])
        match block.mixer:
            case Mamba2Weights() as mixer:
                blocks.append(_Mamba2Block(block.norm, mixer, config, index))
            case AttentionWeights() as mixer:
                blocks.append(_AttentionBlock(block.norm, mixer, config, index))
            case MLPWeights() as mixer:
                blocks.append(_MLPBlock(block.norm, mixer, config))
            case MoEWeights() as mixer:
                blocks.append(_MoEBlock(block.norm, mixer, config, index, branch))
    return blocks
