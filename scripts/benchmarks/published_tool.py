"""The published tool's algorithms, written plainly: what our kernels are compared with.

Quantizing compares every weight with every level; decoding unpacks eight codes from five bytes by 64-bit
shifts, in chunks of rows. Both in PyTorch, with all the threads that it has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.hlwq.hadamard import hadamard_matrix
from common.hlwq.planes import BLOCK

_DISTANCES_AT_ONCE = 1 << 24  # 64 MB
_ROWS_AT_ONCE = 256


def quantize(weight: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """W (out, in), in a multiple of 128 -> codes uint8 (blocks, 128) and norms float16 (blocks, 1)."""
    blocks = weight.float().view(-1, BLOCK)
    norms = blocks.norm(dim=1, keepdim=True).clamp_min(1e-10)
    rotated = (blocks / norms) @ hadamard_matrix() * math.sqrt(BLOCK)
    pieces = [
        (piece[:, :, None] - codebook).abs().argmin(-1).to(torch.uint8)
        for piece in rotated.split(_DISTANCES_AT_ONCE // (BLOCK * codebook.numel()))
    ]
    return torch.cat(pieces), norms.half()


def pack_q5(codes: Tensor) -> Tensor:
    """Codes (rows, columns) of 5 bits, least significant bit first: uint8 (rows, columns * 5 / 8)."""
    words = (codes.view(codes.shape[0], -1, 8).long() << (5 * torch.arange(8))).sum(-1)
    return ((words[:, :, None] >> (8 * torch.arange(5))) & 255).to(torch.uint8).flatten(1)


def decode_q5(packed: Tensor, norms: Tensor, scaled: Tensor) -> Tensor:
    """The way back to bfloat16: packed (rows, columns * 5 / 8), norms (rows, blocks) float16.

    `scaled` is the codebook over sqrt(128), float32 (32,), as the layout stores it.
    """
    chunks = []
    for start in range(0, packed.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        bytes_ = packed[rows].view(packed[rows].shape[0], -1, 5).long()
        words = (bytes_ << (8 * torch.arange(5))).sum(-1)
        codes = ((words[:, :, None] >> (5 * torch.arange(8))) & 31).flatten(1)
        weights = dequantize(codes.view(-1, BLOCK), norms[rows].view(-1, 1), scaled)
        chunks.append(weights.view(codes.shape).bfloat16())
    return torch.cat(chunks)


def dequantize(codes: Tensor, norms: Tensor, scaled: Tensor) -> Tensor:
    """Codes (blocks, 128), norms (blocks, 1) and the codebook over sqrt(128) -> float32 (blocks, 128)."""
    return scaled[codes.long()] @ hadamard_matrix() * norms.float()
