"""Codes and codebooks as published layouts write them: the arithmetic alone, on tensors.

Two ways of packing codes into bytes, what a stored or an implied codebook is, and how many bits codes have
when nothing says so. Which tensor holds what, and what is checked of it, is `published`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from common.errors import CheckpointError
from common.hlwq import native
from common.hlwq.codebook import packing_codebook, published_codebook
from common.hlwq.planes import BLOCK, pack_planes

_FLOAT32_ROUNDING = 4 * torch.finfo(torch.float32).eps  # scaling, storing and scaling back, and some more
_FEWEST_IN_UPPER_HALF = 1 / 64


def nibbles(rows: Tensor) -> Tensor:
    """uint8 (rows, columns / 2) -> codes (rows, columns); byte i of a block: code[64 + i] << 4 | code[i]."""
    halves = rows.view(rows.shape[0], -1, 1, BLOCK // 2)
    return torch.cat([halves & 15, halves >> 4], dim=2).view(rows.shape[0], -1)


def bit_run(rows: Tensor, bits: int, most_significant_first: bool) -> Tensor:
    """uint8 (rows, columns * bits / 8) -> codes (rows, columns): 8 codes in `bits` bytes, bit after bit."""
    if native.usable(rows):
        return native.unpack_run(rows, bits, most_significant_first)
    groups = rows.reshape(rows.shape[0], -1, bits)
    codes = torch.empty(*groups.shape[:2], 8, dtype=torch.uint8)
    for place in range(8):
        byte, start = divmod(place * bits, 8)
        spill = start + bits - 8  # bits of this code that lie in the next byte
        field, following = groups[..., byte], groups[..., byte + 1] if spill > 0 else None
        if most_significant_first:
            field = field >> -spill if following is None else (field << spill) | (following >> (8 - spill))
        else:
            field = field >> start if following is None else (field >> start) | (following << (8 - start))
        torch.bitwise_and(field, (1 << bits) - 1, out=codes[..., place])
    return codes.view(rows.shape[0], -1)


def repacked(
    rows: Tensor, width: int, most_significant_first: bool, bits: int, planes: tuple[Tensor, ...]
) -> None:
    """A run of codes of `width` bits, of whole blocks, into contiguous planes of `bits`, at least as many."""
    if native.usable(rows):
        native.repack_run(rows, width, most_significant_first, bits, planes)
    else:
        pack_planes(bit_run(rows, width, most_significant_first), bits, out=planes)


def stored_codebook(values: Tensor, scaled: bool) -> Tensor:
    """The codebook of a `ct`, or of a `ct_scaled` (divided by sqrt(128)): float32 (2**bits,), read-only.

    One that equals the published codebook, or that of own packs, to float32 rounding is taken to be that one,
    so that the same codes are the same weights in every layout. Raises CheckpointError unless it is finite
    and ascends.
    """
    return _codebook(tuple(values.tolist()), scaled)


@lru_cache(maxsize=256)  # thousands of matrices have the same
def _codebook(values: tuple[float, ...], scaled: bool) -> Tensor:
    codebook = (torch.tensor(values, dtype=torch.float64) * (math.sqrt(BLOCK) if scaled else 1)).float()
    if not bool(torch.isfinite(codebook).all()):
        raise CheckpointError("is a codebook with values that are not finite")
    if not bool((codebook.diff() > 0).all()):
        raise CheckpointError("is a codebook that is not ascending")
    bits = codebook.numel().bit_length() - 1
    for known in (published_codebook(bits), packing_codebook(bits)):
        if bool(((codebook - known).abs() <= _FLOAT32_ROUNDING * known.abs()).all()):
            return known
    return codebook


def extended(codebook: Tensor, bits: int) -> Tensor:
    """`codebook` with entries after its last that no code uses, ascending and finite, for wider planes."""
    missing = (1 << bits) - codebook.numel()
    if not missing:
        return codebook
    last = codebook[-1].double()
    step = last.abs().clamp(min=1) / 1024
    after = (last + step * torch.arange(1, missing + 1)).float()
    if not bool(torch.isfinite(after).all()):
        raise CheckpointError(f"is a codebook that ends at {float(last):.3g}, too large to be computed with")
    return torch.cat([codebook, after])


def bits_of(counts: Tensor) -> int:
    """How many bits codes have of which `counts` (256,) says how often each occurs; by the largest of them.

    Rotated weights lie about 0 evenly, so the upper half of a codebook is used as much as the lower: a
    largest code whose upper half is all but empty is a damaged code rather than the end of a codebook.
    Raises CheckpointError for one.
    """
    largest = int(counts.nonzero().max())
    bits = max(1, largest.bit_length())
    if int(counts[1 << (bits - 1) :].sum()) < _FEWEST_IN_UPPER_HALF * int(counts.sum()):
        raise CheckpointError(
            f"holds a largest code of {largest} far from all others: it is out of range, unless "
            "polar_config.json says how many bits the codes have"
        )
    return bits
