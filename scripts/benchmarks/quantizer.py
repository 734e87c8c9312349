"""Packing one expert's matrix: our quantizer against the straightforward one, which compares all levels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from checkpoint import HIDDEN, INTERMEDIATE
from measure import Comparison, compare
from torch import Tensor

from common.hlwq.codebook import converged_codebook
from common.hlwq.hadamard import hadamard_matrix
from common.hlwq.planes import BLOCK
from common.hlwq.quantize import pack_matrix, quantize

_BLOCKS_AT_ONCE = 4096  # 32 levels of these are 64 MB


def benchmark() -> Iterator[Comparison]:
    """5 bits; rates in MB of bfloat16 weights."""
    weight = torch.randn(INTERMEDIATE, HIDDEN).bfloat16()
    codebook = converged_codebook(5)
    codes = quantize(weight, codebook)[0].view(-1, BLOCK)
    differing = float((codes != broadcast_argmin(weight, codebook)).float().mean())
    assert differing < 1e-4, "the two quantizers disagree beyond ties"
    yield compare(
        "packing",
        ("pack_matrix (quantize and pack planes)", lambda: pack_matrix(weight, 5, codebook)),
        ("broadcast argmin over 32 levels", lambda: broadcast_argmin(weight, codebook)),
        weight.nbytes / 1e6,
        "MB/s",
        5.0,
        pairs=5,
    )


def broadcast_argmin(weight: Tensor, codebook: Tensor) -> Tensor:
    """Codes of W by the distance of every weight to every level; uint8 (blocks, 128)."""
    blocks = weight.float().view(-1, BLOCK)
    norms = blocks.norm(dim=1, keepdim=True).clamp_min(1e-10)
    rotated = (blocks / norms) @ hadamard_matrix() * math.sqrt(BLOCK)
    pieces = [
        (piece[:, :, None] - codebook).abs().argmin(-1).to(torch.uint8)
        for piece in rotated.split(_BLOCKS_AT_ONCE)
    ]
    return torch.cat(pieces)
