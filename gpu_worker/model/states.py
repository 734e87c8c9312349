"""What a sequence leaves behind at each token: recurrent states, keys and values, in pools of fixed size.

A place in the pools belongs to one sequence at a time; who gets which place is the scheduler's affair. The
pools keep one law: keys and values beyond a sequence's length are zero. Attention relies on it, since a
masked one still enters the arithmetic with weight 0, and 0 * NaN from stale memory is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.model_config import ATTENTION, MAMBA, ModelConfig


class StatePools:
    """States of up to `sequences` sequences of up to `max_context` tokens.

    conv: (mamba blocks, sequences, conv_dim, conv_kernel - 1), compute dtype; the convolution's last inputs
    ssm: (mamba blocks, sequences, heads, head_dim, state), float32
    keys, values: (attention blocks, sequences, kv heads, max_context, head_dim), compute dtype
    lengths: (sequences,) int64 on the device; tokens seen so far
    """

    def __init__(
        self,
        config: ModelConfig,
        sequences: int,
        max_context: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        assert sequences > 0 and max_context > 0
        device = torch.device(device)
        mamba, attention = (len(config.blocks_of(kind)) for kind in (MAMBA, ATTENTION))
        self.sequences, self.max_context = sequences, max_context
        self.conv = _zeros((mamba, sequences, config.conv_dim, config.conv_kernel - 1), dtype, device)
        heads = (config.mamba_num_heads, config.mamba_head_dim)
        self.ssm = _zeros((mamba, sequences, *heads, config.ssm_state_size), torch.float32, device)
        kv_shape = (attention, sequences, config.num_key_value_heads, max_context, config.head_dim)
        self.keys, self.values = (_zeros(kv_shape, dtype, device) for _ in range(2))
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in (self.conv, self.ssm, self.keys, self.values))

    def reset(self, sequence: int) -> None:
        """Make this place as new. Clears what was used and no more: untouched pages stay untouched."""
        used = int(self.lengths[sequence])
        for kv in (self.keys, self.values):
            kv[:, sequence, :, :used].zero_()
        for state in (self.conv, self.ssm):
            state[:, sequence].zero_()
        self.lengths[sequence] = 0


@dataclass(frozen=True)
class PrefillStep:
    """The rows are consecutive tokens of one sequence, the first of them at position `start`."""

    pools: StatePools
    sequence: int
    start: int


@dataclass(frozen=True)
class DecodeStep:
    """Row i is the token at positions[i] of sequences[i]; no position reaches `context`.

    sequences, positions: (b,) int64 on the device, so that a captured step serves any places and any lengths.
    """

    pools: StatePools
    sequences: Tensor
    positions: Tensor
    context: int


Step = PrefillStep | DecodeStep


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost no memory until written; on the CPU torch.zeros would touch every page."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, f"u{dtype.itemsize}")).view(dtype)
