"""An attention block's mixer: grouped-query attention over the pools' keys and values.

There is no positional encoding: order enters through Mamba-2 alone. Prefill is host-driven and sees its
sequence's past as a view; decode gathers the places of its batch by tensors and masks by length, in shapes
that depend on nothing but the batch and `context`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_worker.model.states import DecodeStep, PrefillStep, Step
from gpu_worker.model.weights import AttentionWeights


def attend_chunk(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last t of s positions: q (t, heads, d), keys and values (kv heads, s, d).

    Returns (t, heads * d). The kv heads stand as the batch: a group's queries share one without a copy of it.
    """
    (t, heads, _), kv_heads = q.shape, keys.shape[0]
    grouped = torch.unflatten(q, 1, (kv_heads, -1)).permute(1, 2, 0, 3)
    keys, values = (m[:, None].expand(-1, heads // kv_heads, -1, -1) for m in (keys, values))
    y = _attend_last(grouped, keys, values)
    return y.permute(2, 0, 1, 3).reshape(t, -1)


def _attend_last(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last of the positions: q (..., t, d), keys and values (..., s, d)."""
    t, s, d = q.shape[-2], keys.shape[-2], q.shape[-1]
    if s == t:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True)
    if q.is_cuda and q.dtype != torch.float32 and d % 8 == 0:
        # Flash attention's causal mask is aligned to the last position and never laid out in memory. What
        # PyTorch offers for it, torch.nn.attention.bias, does no more than this, and takes seconds to import.
        return torch.ops.aten._scaled_dot_product_flash_attention(q, keys, values, is_causal=True)[0]
    mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def attend_batch(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one token each: q (b, heads, d), keys and values (b, kv heads, s, d), lengths (b,) int64.

    Returns (b, heads * d). A group's queries see the same keys, so they stand where a chunk's tokens would.
    """
    visible = torch.arange(keys.shape[2], device=q.device) < lengths[:, None]
    grouped = torch.unflatten(q, 1, (keys.shape[1], -1))
    y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None, None])
    return y.flatten(1)


class Attention:
    """The mixer of the `index`-th attention block."""

    def __init__(self, weights: AttentionWeights, head_dim: int, index: int) -> None:
        self.weights, self.head_dim, self.index = weights, head_dim, index

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x (rows, hidden) to (rows, hidden); the rows' keys and values enter the pools."""
        w, rows = self.weights, x.shape[0]
        q, k, v = (proj(x).view(rows, -1, self.head_dim) for proj in (w.q_proj, w.k_proj, w.v_proj))
        y = self._prefill(q, k, v, step) if isinstance(step, PrefillStep) else self._decode(q, k, v, step)
        return w.o_proj(y)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, step: PrefillStep) -> Tensor:
        end = step.start + q.shape[0]
        keys, values = (
            pool[self.index, step.sequence, :, :end] for pool in (step.pools.keys, step.pools.values)
        )
        keys[:, step.start :] = k.transpose(0, 1)
        values[:, step.start :] = v.transpose(0, 1)
        return attend_chunk(q, keys, values)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, step: DecodeStep) -> Tensor:
        keys, values = step.pools.keys[self.index], step.pools.values[self.index]
        keys[step.sequences, :, step.positions] = k
        values[step.sequences, :, step.positions] = v
        keys, values = (m[:, :, : step.context].index_select(0, step.sequences) for m in (keys, values))
        return attend_batch(q, keys, values, step.positions + 1)
