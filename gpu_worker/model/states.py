"""What a sequence leaves behind at each token: recurrent states, keys and values, in pools of fixed size.

A place in the pools belongs to one sequence at a time; who gets which place is the scheduler's affair. The
pools keep one law: keys and values beyond a sequence's length are zero. Attention relies on it, since a
masked one still enters the arithmetic with weight 0, and 0 * NaN from stale memory is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.model_config import ATTENTION, MAMBA, ModelConfig


class Recurrent(NamedTuple):
    """One sequence's recurrent states after some token, on the host: `conv` and `ssm` without `sequences`."""

    conv: Tensor
    ssm: Tensor

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.ssm.nbytes


class KeysValues(NamedTuple):
    """Of consecutive tokens of one sequence, on the host: (attention blocks, kv heads, tokens, head_dim)."""

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


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
        return sum(pool.nbytes for pool in (*self._recurrent, *self._context))

    @property
    def recurrent_bytes(self) -> int:
        """Of one sequence's recurrent states."""
        return sum(pool.nbytes for pool in self._recurrent) // self.sequences

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token of one sequence."""
        return sum(pool.nbytes for pool in self._context) // (self.sequences * self.max_context)

    def reset(self, sequence: int) -> None:
        """Make this place as new. Clears what was used and no more: untouched pages stay untouched."""
        self.cut_context(sequence, 0)
        for state in self._recurrent:
            state[:, sequence].zero_()
        self.lengths[sequence] = 0

    def read_recurrent(self, sequence: int) -> Recurrent:
        """A copy on the host; waits for the steps that were launched."""
        states = Recurrent(*(torch.empty(pool[:, 0].shape, dtype=pool.dtype) for pool in self._recurrent))
        for state, pool in zip(states, self._recurrent, strict=True):
            _copy(state, pool[:, sequence], depth=1)
        return states

    def write_recurrent(self, sequence: int, states: Recurrent) -> None:
        for state, pool in zip(states, self._recurrent, strict=True):
            _copy(pool[:, sequence], state, depth=1)

    def read_context(self, sequence: int, start: int, end: int) -> KeysValues:
        """A copy on the host of keys and values at positions `start` to `end`; waits for launched steps."""
        shape = (self.keys.shape[0], self.keys.shape[2], end - start, self.keys.shape[4])
        context = KeysValues(*(torch.empty(shape, dtype=pool.dtype) for pool in self._context))
        for part, pool in zip(context, self._context, strict=True):
            _copy(part, pool[:, sequence, :, start:end], depth=2)
        return context

    def write_context(self, sequence: int, start: int, context: KeysValues) -> None:
        """The place had nothing beyond `start`; who writes sees to its length."""
        for part, pool in zip(context, self._context, strict=True):
            _copy(pool[:, sequence, :, start : start + part.shape[2]], part, depth=2)

    def copy_context(self, source: int, target: int, length: int) -> None:
        """Keys and values of the first tokens of one sequence to a place that is as new."""
        for pool in self._context:
            pool[:, target, :, :length] = pool[:, source, :, :length]

    def cut_context(self, sequence: int, length: int) -> None:
        """Forget keys and values beyond the first tokens."""
        used = int(self.lengths[sequence])
        for pool in self._context:
            pool[:, sequence, :, length:used].zero_()

    @property
    def _recurrent(self) -> tuple[Tensor, Tensor]:
        return self.conv, self.ssm

    @property
    def _context(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


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


def _copy(target: Tensor, source: Tensor, depth: int) -> None:
    """Between host and device, piece by contiguous piece: these are what is left `depth` dimensions down.

    For a whole that is not contiguous, a GPU would take as much memory again.
    """
    if depth == 0:
        target.copy_(source)
    else:
        for piece, other in zip(target, source, strict=True):
            _copy(piece, other, depth - 1)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost no memory until written; on the CPU torch.zeros would touch every page."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, f"u{dtype.itemsize}")).view(dtype)
