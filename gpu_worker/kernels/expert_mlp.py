"""One routed expert on a group of rows, computed straight from its packed record (plain PyTorch)."""

from __future__ import annotations

import torch
from torch import Tensor

from common.hlwq.matrix import PackedMatrix


def expert_mlp(x: Tensor, up: PackedMatrix, down: PackedMatrix) -> Tensor:
    """down(relu(up(x))^2) for x (rows, hidden), in x.dtype.

    A row's result depends on the rows it is computed with only through their number (the blocking of the
    matrix product), never on which slot the record lies in.
    """
    hidden = torch.relu(up.product(x)).square()
    return down.product(hidden)
