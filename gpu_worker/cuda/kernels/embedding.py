"""Rows of the embeddings, read from page-locked memory of the host.

A token needs 5 KB of them in a step, and on the device they would take 0.7 GB: five slots in every layer of
the 30B. Not done here: embeddings that lie where tokens do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024  # a program


def embedding_plain(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """tokens (rows,) int64 to (rows, hidden) in `dtype`; weight (vocab, hidden)."""
    return F.embedding(tokens, weight).to(dtype)


def embedding(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As `embedding_plain`; the weight, contiguous, may be page-locked memory. Ids must be in range."""
    rows, hidden = tokens.shape[0], weight.shape[1]
    y = torch.empty(rows, hidden, dtype=dtype, device=tokens.device)
    grid = (rows, triton.cdiv(hidden, _COLUMNS))
    _embedding_kernel[grid](tokens, weight, y, HIDDEN=hidden, COLUMNS=_COLUMNS)
    return y


@triton.jit
def _embedding_kernel(tokens, weight, y, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < HIDDEN
    values = tl.load(weight + tl.load(tokens + row) * HIDDEN + column, mask=inside)
    tl.store(y + row * HIDDEN + column, values.to(y.dtype.element_ty), mask=inside)
