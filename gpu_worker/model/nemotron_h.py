"""NemotronH: embeddings, a stack of blocks of four kinds, a final norm and lm_head.

Equal to transformers' NemotronHForCausalLM on the same weights. A block is hidden + mixer(norm(hidden)); the
residual stream is in the compute dtype. Callers cut prompts into chunks, own the pools and choose tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.model_config import ModelConfig
from gpu_worker.model.attention import Attention
from gpu_worker.model.mamba2 import PLAIN_MIXER, Mamba2, MixerKernels
from gpu_worker.model.mlp import MLP
from gpu_worker.model.moe import MoE, RoutedExperts, route
from gpu_worker.model.norms import added_norm, rms_norm
from gpu_worker.model.part_times import LM_HEAD, PartTimes
from gpu_worker.model.states import DecodeStep, PrefillStep, StatePools, Step
from gpu_worker.model.weights import AttentionWeights, Mamba2Weights, MLPWeights, ModelWeights, MoEWeights

Mixer = Callable[[Tensor, Step], Tensor]


@dataclass(frozen=True)
class ModelKernels:
    """What computes beside projections, experts and attention: PyTorch, or others with its signatures."""

    mixer: MixerKernels = PLAIN_MIXER
    router: Callable[..., tuple[Tensor, Tensor]] = route
    added_norm: Callable[..., tuple[Tensor, Tensor]] = added_norm


PLAIN_KERNELS = ModelKernels()


class NemotronH:
    """The model over dense weights of its own and routed experts of someone else's."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        experts: RoutedExperts,
        kernels: ModelKernels = PLAIN_KERNELS,
    ) -> None:
        self.config, self.weights = config, weights
        self.times = PartTimes()
        self.blocks = list(zip(weights.blocks, _mixers(config, weights, experts, kernels), strict=True))
        self._norms = [*(block.norm for block in weights.blocks), weights.norm_f]
        self._added_norm = kernels.added_norm

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, sequence: int, pools: StatePools, start: int | None = None) -> Tensor:
        """The next t >= 1 tokens of one sequence: tokens (t,) int64 to hidden (t, hidden_size).

        `start` is the number of tokens so far, from callers that need not ask the device for it. Takes memory
        in proportion to t, so long prompts come in chunks.
        """
        start, t = int(pools.lengths[sequence]) if start is None else start, tokens.shape[0]
        assert 0 < t <= pools.max_context - start, (
            f"{t} tokens after {start} in a context of {pools.max_context}"
        )
        # Advanced before the blocks run: what a step that fails half-way has written then lies below the
        # length, where reset clears it.
        pools.lengths[sequence] += t
        return self._run(tokens, PrefillStep(pools, sequence, start))

    @torch.inference_mode()
    def decode(
        self, tokens: Tensor, sequences: Tensor, pools: StatePools, context: int | None = None
    ) -> Tensor:
        """The next token of b different sequences: tokens, sequences (b,) int64 to hidden (b, hidden_size).

        No sequence may exceed `context` tokens, this one included (default: all that the pools hold). So many
        places are what attention looks at, and a caller that knows its lengths saves work by rounding them up
        to a few sizes. Shapes depend on b and `context` alone, and nothing waits for the device.
        """
        context = context or pools.max_context
        positions = pools.lengths.index_select(0, sequences)
        pools.lengths.index_copy_(0, sequences, positions + 1)
        return self._run(tokens, DecodeStep(pools, sequences, positions, context))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (rows, hidden_size) to logits (rows, vocab_size) float32."""
        with self.times.spent_in(LM_HEAD):
            return self.weights.lm_head(hidden).float()

    def _run(self, tokens: Tensor, step: Step) -> Tensor:
        epsilon = self.config.layer_norm_epsilon
        hidden = self.weights.embedded(tokens)
        normed = rms_norm(hidden, self._norms[0], epsilon)
        for kind, (_, mixer), norm in zip(self.config.pattern, self.blocks, self._norms[1:], strict=True):
            with self.times.spent_in(kind):
                hidden, normed = self._added_norm(hidden, mixer(normed, step), norm, epsilon)
        return normed


def _mixers(
    config: ModelConfig, weights: ModelWeights, experts: RoutedExperts, kernels: ModelKernels
) -> list[Mixer]:
    """The mixers in order; each kind counts its own, because pools and layers are indexed that way."""
    gates = [block.mixer.gate for block in weights.blocks if isinstance(block.mixer, MoEWeights)]
    mixers: list[Mixer] = []
    for number, block in enumerate(weights.blocks):
        index = config.pattern[:number].count(config.pattern[number])
        match block.mixer:
            case Mamba2Weights():
                mixers.append(Mamba2(block.mixer, config, index, kernels.mixer))
            case AttentionWeights():
                mixers.append(Attention(block.mixer, config.head_dim, index))
            case MLPWeights():
                mixers.append(MLP(block.mixer))
            case MoEWeights():
                next_gate = gates[index + 1] if index + 1 < len(gates) else None
                mixers.append(MoE(block.mixer, next_gate, config, index, experts, kernels.router))
    return mixers
