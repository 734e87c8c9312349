"""One pass of an unpacked model over a text, block by block: memory holds the weights of one.

The blocks are transformers' own, filled one after the other; all of the text goes through a block before the
next is read. Of a MoE block's routed experts one is in memory at a time. Whoever wants to know what matrices
see is told while they compute; what is kept of it is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock

from common.checkpoint.packing import unpacked
from common.checkpoint.source import WeightSource
from common.errors import CheckpointError
from common.expert_key import ExpertKey
from common.model_config import MLP, MOE

_TOKEN_BY_TOKEN = (MLP, MOE)  # blocks that need not know which window a token is in


class Observer(Protocol):
    """Is told what the matrices of the block at work see."""

    def dense(self, name: str, inputs: Tensor) -> None:
        """Inputs (tokens, in) of a dense matrix, by canonical name; may come in several pieces."""

    def routed(self, layer: int, inputs: Tensor, choices: Tensor, weights: Tensor) -> None:
        """Inputs (tokens, hidden) of a layer's routed experts, whom they are sent to and with which weights
        (tokens, k)."""

    def block_done(self) -> None:
        """Nothing more comes of this block."""


@torch.inference_mode()
def forward(
    source: WeightSource, windows: Sequence[Tensor], observer: Observer, progress: Callable[[int, int], None]
) -> list[Tensor]:
    """Run token ids (tokens,) of each window through all blocks; the hidden states before lm_head of each.

    Computes in float32. `progress` gets bytes of weights, done and in all. Raises CheckpointError naming the
    block after which values are not finite.
    """
    config = NemotronHConfig.from_pretrained(source.directory, local_files_only=True)
    config._attn_implementation = "sdpa"
    sizes = _block_sizes(source)
    embeddings = unpacked(source.dense_matrix("backbone.embeddings.weight"))
    hidden = [F.embedding(window, embeddings)[None].float() for window in windows]
    del embeddings
    for index, kind in enumerate(source.config.pattern):
        block = _load(source, config, index, observer)
        if kind in _TOKEN_BY_TOKEN:
            lengths = [window.shape[1] for window in hidden]
            hidden = list(block(torch.cat(hidden, dim=1)).split(lengths, dim=1))
        else:
            hidden = [block(window) for window in hidden]
        if not all(bool(torch.isfinite(window).all()) for window in hidden):
            raise CheckpointError(f"{source.directory}: values are not finite after block {index}")
        observer.block_done()
        progress(sum(sizes[: index + 1]), sum(sizes))
    norm = unpacked(source.dense_matrix("backbone.norm_f.weight")).float()
    final = [F.rms_norm(window[0], norm.shape, norm, source.config.layer_norm_epsilon) for window in hidden]
    for window in final:
        observer.dense("lm_head.weight", window)
    observer.block_done()
    return final


def _block_sizes(source: WeightSource) -> list[int]:
    """Bytes of each block's weights as they are stored."""
    sizes = []
    for index, kind in enumerate(source.config.pattern):
        stored = [kept for name, kept in source.dense_stored.items() if name.startswith(_prefix(index))]
        routed = source.routed_bytes // source.config.num_layers if kind == MOE else 0
        sizes.append(sum(kept.size for kept in stored) + routed)
    return sizes


def _load(source: WeightSource, config: NemotronHConfig, index: int, observer: Observer) -> nn.Module:
    """One block with its weights in float32, and the observer listening at its matrices."""
    with torch.device("meta"):
        block = NemotronHBlock(config, index)
    if source.config.pattern[index] == MOE:
        block.mixer.experts = _RoutedExperts(source, source.config.blocks_of(MOE).index(index), observer)
    names = [name for name in source.dense_stored if name.startswith(_prefix(index))]
    weights = {
        name.removeprefix(_prefix(index)): unpacked(source.dense_matrix(name)).float() for name in names
    }
    block.load_state_dict(weights, assign=True)
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_listener(f"{_prefix(index)}{name}.weight", observer))
    return block.eval()


def _listener(name: str, observer: Observer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, arguments: observer.dense(name, arguments[0].reshape(-1, arguments[0].shape[-1]))


def _prefix(index: int) -> str:
    return f"backbone.layers.{index}."


class _RoutedExperts(nn.Module):
    """Stands in for transformers' module of the same place, which holds all experts of a layer at once."""

    def __init__(self, source: WeightSource, layer: int, observer: Observer) -> None:
        super().__init__()
        self._source, self._layer, self._observer = source, layer, observer

    def forward(self, hidden_states: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        self._observer.routed(self._layer, hidden_states, choices, weights)
        return routed_output(self._source, self._layer, hidden_states, choices, weights)


def routed_output(
    source: WeightSource, layer: int, inputs: Tensor, choices: Tensor, weights: Tensor
) -> Tensor:
    """What a layer's routed experts make of inputs (tokens, hidden), choices and weights (tokens, k)."""
    total = torch.zeros_like(inputs)
    for expert in range(source.config.n_routed_experts):
        tokens, rank = torch.where(choices == expert)
        if tokens.numel() == 0:
            continue
        up, down = (unpacked(matrix).float() for matrix in source.expert(ExpertKey(layer, expert)))
        inner = F.linear(inputs[tokens], up).relu_().square_()
        total.index_add_(0, tokens, F.linear(inner, down).mul_(weights[tokens, rank, None]))
    return total
