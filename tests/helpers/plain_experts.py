"""Routed experts straight from full-precision weights: the plain twin of all that caches and packs them.

Records what it is asked and what it is hinted, in order. Nothing in it waits for the device, so a decode step
over it can be watched for host synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class PlainExperts:
    """`ups[layer]` (experts, intermediate, hidden) and `downs[layer]` (experts, hidden, intermediate)."""

    def __init__(self, ups: Sequence[Tensor], downs: Sequence[Tensor], wants_hints: bool = False) -> None:
        self.ups, self.downs, self.wants_hints = ups, downs, wants_hints
        self.calls: list[tuple[str, int, Tensor]] = []

    def expect(self, layer: int, choices: Tensor) -> None:
        """Everything is here."""

    def compute(self, layer: int, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        self.calls.append(("compute", layer, choices))
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert, weight in zip(choices.unbind(1), weights.unbind(1), strict=True):
            up, down = (matrices[layer][expert].to(x.dtype) for matrices in (self.ups, self.downs))
            inner = F.relu(up @ x[:, :, None]).square()
            total += (down @ inner)[:, :, 0] * weight[:, None]
        return total.to(x.dtype)

    def hint(self, layer: int, choices: Tensor) -> None:
        self.calls.append(("hint", layer, choices))
