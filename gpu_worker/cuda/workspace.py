"""What a chunk of a prompt takes of the device's memory beside weights, states and slots, from shapes alone.

For whoever divides the memory before anything is there. The largest set of tensors that are alive together,
block by block, with dense matrices packed, which takes more than plain ones. Not counted: what an allocator
loses between tensors, and the library workspaces of a process.
"""

from __future__ import annotations

import torch

from common.hlwq.planes import padded
from common.model_config import ATTENTION, MAMBA, MLP, MOE, ModelConfig
from gpu_worker.cuda.kernels.matrix_decode import MOST_DECODED
from gpu_worker.cuda.prompt_experts import CALL_PAIRS
from gpu_worker.model.mamba2 import SCANNED_TOKENS

_WIDE = 4  # bytes of a float32


def prompt_workspace(config: ModelConfig, chunk: int, dtype: torch.dtype) -> int:
    """Bytes for chunks of so many tokens."""
    size, hidden = dtype.itemsize, config.hidden_size
    # The residual stream before and after a block, and its norm, in whose making it stands in float32 twice.
    stream = 3 * chunk * hidden * size
    blocks = {MAMBA: _mamba, ATTENTION: _attention, MLP: _mlp, MOE: _moe}
    largest = max(blocks[kind](config, chunk, size) for kind in set(config.pattern))
    return stream + max(largest, 2 * chunk * hidden * _WIDE)


def _projection(outs: int, columns: int, rows: int, size: int) -> int:
    """Of a packed projection: some of its weights, decoded, and the rows as they are rotated."""
    return min(MOST_DECODED, outs * padded(columns) * size) + rows * padded(columns) * size


def _mamba(config: ModelConfig, chunk: int, size: int) -> int:
    inner, heads = config.mamba_intermediate_size, config.mamba_num_heads
    outs = inner + config.conv_dim + heads
    projected, mixed = chunk * outs * size, chunk * inner * size
    tokens = min(chunk, SCANNED_TOKENS)
    conv = tokens * config.conv_dim * (2 * size + 2 * _WIDE)
    decays = tokens * heads * 2 * _WIDE  # in float64
    states = -(-tokens // config.chunk_size) * inner * config.ssm_state_size * _WIDE
    scan = conv + max(decays + states + tokens * inner * size, 6 * tokens * inner * _WIDE)
    return projected + max(
        _projection(outs, config.hidden_size, chunk, size),
        mixed + scan,
        2 * mixed + _projection(config.hidden_size, inner, chunk, size),
    )


def _attention(config: ModelConfig, chunk: int, size: int) -> int:
    columns = config.num_attention_heads * config.head_dim
    keys = chunk * config.num_key_value_heads * config.head_dim * size
    return 3 * chunk * columns * size + 2 * keys + _projection(config.hidden_size, columns, chunk, size)


def _mlp(config: ModelConfig, chunk: int, size: int) -> int:
    return _feed_forward(config.intermediate_size, config.hidden_size, chunk, size)


def _moe(config: ModelConfig, chunk: int, size: int) -> int:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    pairs = chunk * config.num_experts_per_tok
    call = min(pairs, max(CALL_PAIRS, chunk)) * (inner * _WIDE + padded(inner) * size)
    routed = pairs * hidden * _WIDE + chunk * (padded(hidden) + 2 * hidden) * size + call
    shared = _feed_forward(config.moe_shared_expert_intermediate_size, hidden, chunk, size)
    return max(routed, shared)


def _feed_forward(inner: int, hidden: int, chunk: int, size: int) -> int:
    return 2 * chunk * inner * size + max(
        _projection(inner, hidden, chunk, size), _projection(hidden, inner, chunk, size)
    )
