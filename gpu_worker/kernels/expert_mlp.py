"""Routed experts on the rows that chose them, computed straight from packed records.

On the CPU by the native kernels, a group of experts in one call; elsewhere, and where these kernels are
missing or switched off, by the PyTorch twins below, which are the definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.hlwq import native
from common.hlwq.matrix import PackedMatrix
from common.record import RecordLayout
from gpu_worker.slots.groups import Positions


def expert_mlp(x: Tensor, up: PackedMatrix, down: PackedMatrix) -> Tensor:
    """down(relu(up(x))^2) for x (rows, hidden), in x.dtype."""
    return down.product(torch.relu(up.product(x)).square())


def combine(products: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """products (rows * k, hidden), weights (rows, k) float32 to their sums (rows, hidden), in rank order."""
    rows, k = weights.shape
    if native.usable(products, weights) and products.dtype == torch.float32:
        return native.combine(products, weights).to(dtype)
    ranked = products.view(rows, k, -1)
    total = ranked[:, 0].float() * weights[:, :1]
    for rank in range(1, k):
        total += ranked[:, rank].float() * weights[:, rank : rank + 1]
    return total.to(dtype)


class ExpertKernel:
    """The experts of one layer; records are handed over as they lie, in slots or frames."""

    def __init__(self, layout: RecordLayout) -> None:
        self._layout = layout
        self._native = native.record_layout(layout.up), native.record_layout(layout.down)

    def __call__(
        self, records: Sequence[Tensor], positions: Sequence[Positions], x: Tensor, products: Tensor
    ) -> None:
        """products[p] = expert(x[p // k]) at each expert's positions; products (rows * k, hidden) float32.

        A row's product does not depend on where its record lies, nor, but for the blocking of the twins'
        matrix products, on the rows that it is computed with.
        """
        if not records:
            return
        k = products.shape[0] // x.shape[0]
        if native.usable(x, products, *records):
            starts = np.cumsum([0, *map(len, positions)], dtype=np.int64)
            addresses = [record.data_ptr() for record in records]
            native.experts(
                *self._native, addresses, starts, np.concatenate(positions), k, x.float(), products
            )
            return
        up, down = self._layout.up, self._layout.down
        for record, where in zip(records, positions, strict=True):
            index = torch.from_numpy(where).to(x.device)
            products[index] = expert_mlp(x[index // k], up.view(record), down.view(record)).float()
