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
    (t, heads, _), (kv_heads, s, _) = q.shape, keys.shape
    grouped = torch.unflatten(q, 1, (kv_heads, -1)).permute(1, 2, 0, 3)
    keys, values = (m[:, None].expand(-1, heads // kv_heads, -1, -1) for m in (keys, values))
    mask = None if s == t else _lower_right(t, s, q.device)
    y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, is_causal=mask is None)
    return y.permute(2, 0, 1, 3).reshape(t, -1)


def _lower_right(t: int, s: int, device: torch.device) -> Tensor:
    """Which of s positions the last t may see. Kernels of the GPU know this mask without being shown it."""
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # takes a second, which a CPU need not wait

        return causal_lower_right(t, s)
    return torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)


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
