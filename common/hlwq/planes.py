"""Bit planes: the packed form of codes, in planes whose width is a power of two.

A code of 5 bits is its low 4 bits in one plane and its high bit in another, so that every plane is read
with whole-byte loads. Inside a block of 128 codes a plane of width w takes 16 * w bytes, and byte i holds,
from its least significant bits upward, the fields of codes i, i + 16w, i + 32w, ... Field j of
consecutive bytes thus belongs to consecutive codes: one vector load plus one shift and mask gives codes in
order, with no lane crossing. (At width 4 this is byte for byte the published "nibbles" layout.)
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from common.errors import ConfigError
from common.hlwq import native

BLOCK = 128
RAW_BITS = 16
PLANE_WIDTHS: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def check_bits(bits: int) -> None:
    """Raise ConfigError unless `bits` is a width that records can have."""
    if bits != RAW_BITS and bits not in PLANE_WIDTHS:
        allowed = ", ".join(str(width) for width in [*PLANE_WIDTHS, RAW_BITS])
        raise ConfigError(f"unsupported number of bits {bits}; one of {allowed}")


def padded(columns: int) -> int:
    """`columns` rounded up to whole blocks."""
    return -(-columns // BLOCK) * BLOCK


def pack_planes(codes: Tensor, bits: int, out: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    """Codes (rows, columns) uint8, columns a multiple of 128 -> planes (rows, columns * width / 8) uint8.

    Those of `out`, contiguous, if it is given.
    """
    rows, columns = codes.shape
    assert columns % BLOCK == 0, "pad before packing"
    planes = out or empty_planes(rows, columns, bits, codes.device)
    if native.usable(codes):
        native.pack_planes(codes, bits, planes)
        return planes
    shift = 0
    for plane, width in zip(planes, PLANE_WIDTHS[bits], strict=True):
        fields = (codes >> shift) & ((1 << width) - 1)
        grouped = fields.view(rows, columns // BLOCK, 8 // width, 16 * width)
        packed = (grouped << _field_shifts(width, codes.device)).sum(dim=2, dtype=torch.uint8)
        plane.copy_(packed.view(plane.shape))
        shift += width
    return planes


def empty_planes(
    rows: int, columns: int, bits: int, device: torch.device | None = None
) -> tuple[Tensor, ...]:
    """Planes of codes (rows, columns), not filled."""
    return tuple(
        torch.empty(rows, columns * width // 8, dtype=torch.uint8, device=device)
        for width in PLANE_WIDTHS[bits]
    )


def unpack_planes(planes: tuple[Tensor, ...], bits: int) -> Tensor:
    """The inverse of `pack_planes`: codes (rows, columns) uint8."""
    rows = planes[0].shape[0]
    if native.usable(*planes):
        return native.unpack_planes(planes, 8 * planes[0].shape[1] // PLANE_WIDTHS[bits][0], bits)
    codes: Tensor | None = None
    position = 0
    for plane, width in zip(planes, PLANE_WIDTHS[bits], strict=True):
        blocks = plane.view(rows, -1, 1, 16 * width)
        fields = (blocks >> _field_shifts(width, plane.device)).bitwise_and_((1 << width) - 1).view(rows, -1)
        codes = fields if codes is None else codes.bitwise_or_(fields.bitwise_left_shift_(position))
        position += width
    assert codes is not None
    return codes


@cache
def _field_shifts(width: int, device: torch.device) -> Tensor:
    """Where the fields of a byte begin: (8 / width, 1) uint8."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)[:, None]
