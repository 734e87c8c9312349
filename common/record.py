"""The record: the bytes of one packed expert, of one fixed stride, and where each part lies.

The layout follows from the model's shape and the bits of each matrix alone, so both processes, the
files on disk and the kernels compute it and never store offsets. Code planes come first, norms
after; every section starts at a multiple of 128 bytes and the stride is a multiple of 4096, so that
records can be read straight into page-aligned frames. This file owns the arithmetic of offsets; what
the bits of a plane mean is `common.hlwq.planes`, and who holds a record is the arena's or the slots' affair.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK, PLANE_WIDTHS, RAW_BITS, check_bits, padded
from common.model_config import ModelConfig

RECORD_FORMAT = 1
SECTION_ALIGNMENT = 128
STRIDE_ALIGNMENT = 4096


class Section(NamedTuple):
    """A run of bytes inside a record."""

    offset: int
    size: int


@dataclass(frozen=True)
class MatrixLayout:
    """One matrix of a record: its shape, its bits, and its sections."""

    name: str
    out_features: int
    in_features: int
    bits: int
    planes: tuple[Section, ...]
    norms: Section | None

    def view(self, record: Tensor) -> PackedMatrix:
        """The matrix inside `record` (uint8, (stride,)) without copying."""
        rows = [
            record[section.offset : section.offset + section.size].view(self.out_features, -1)
            for section in self.planes
        ]
        norms = None
        if self.norms is not None:
            run = record[self.norms.offset : self.norms.offset + self.norms.size]
            norms = run.view(torch.float16).view(self.out_features, -1)
        return PackedMatrix(self.bits, self.in_features, tuple(rows), norms)

    def store(self, matrix: PackedMatrix, record: Tensor) -> None:
        """Copy `matrix` into its sections of `record`; the shapes must be this layout's."""
        target = self.view(record)
        assert matrix.bits == self.bits and matrix.in_features == self.in_features, "matrix of another layout"
        for source, plane in zip(matrix.planes, target.planes, strict=True):
            plane.copy_(source)
        if target.norms is not None and matrix.norms is not None:
            target.norms.copy_(matrix.norms)


@dataclass(frozen=True)
class RecordLayout:
    """Where the up and down projections of one routed expert lie in its record."""

    up: MatrixLayout
    down: MatrixLayout
    stride: int

    @property
    def digest(self) -> str:
        """Hash of everything that decides where a byte lies; peers compare it, nobody guesses."""
        described = json.dumps({"format": RECORD_FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:32]

    @property
    def matrices(self) -> tuple[MatrixLayout, MatrixLayout]:
        return self.up, self.down


def record_layout(config: ModelConfig, up_bits: int, down_bits: int) -> RecordLayout:
    """The layout of this model's records; `*_bits` in {2, 3, 4, 5, 6, 8, 16} (16: raw bfloat16)."""
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    specs = [("up_proj", intermediate, hidden, up_bits), ("down_proj", hidden, intermediate, down_bits)]
    cursor, planes, norms = 0, [], []
    for _, rows, columns, bits in specs:
        sections = []
        for size in _plane_bytes(columns, bits):
            sections.append(Section(cursor, rows * size))
            cursor = _align(cursor + rows * size, SECTION_ALIGNMENT)
        planes.append(tuple(sections))
    for _, rows, columns, bits in specs:
        size = 0 if bits == RAW_BITS else rows * padded(columns) // BLOCK * 2
        norms.append(Section(cursor, size) if size else None)
        cursor = _align(cursor + size, SECTION_ALIGNMENT)
    up, down = (
        MatrixLayout(name, rows, columns, bits, planes[i], norms[i])
        for i, (name, rows, columns, bits) in enumerate(specs)
    )
    return RecordLayout(up, down, _align(cursor, STRIDE_ALIGNMENT))


def _plane_bytes(columns: int, bits: int) -> list[int]:
    """Bytes of one row in each plane."""
    check_bits(bits)
    if bits == RAW_BITS:
        return [columns * 2]
    return [padded(columns) * width // 8 for width in PLANE_WIDTHS[bits]]


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
