"""The record: the bytes of one packed expert, of one fixed stride, and where each part lies.

The layout follows from the model's shape and the bits of each matrix alone, so both processes, the
files on disk and the kernels compute it and never store offsets. Code planes come first, then norms, then
codebooks: a record holds all that computing its expert takes. Every section starts at a multiple of 128 bytes
and the stride is a multiple of 4096, so that records can be read straight into page-aligned frames. Bits may
differ from layer to layer; the stride is that of the largest. A dense matrix that is kept packed is laid out
in the same way, alone. This file owns the arithmetic of offsets; what the bits of a plane mean is
`common.hlwq.planes`, and who holds a record is the arena's or the slots' affair.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK, PLANE_WIDTHS, RAW_BITS, check_bits, padded
from common.model_config import ModelConfig

RECORD_FORMAT = 2
SECTION_ALIGNMENT = 128
STRIDE_ALIGNMENT = 4096


class Section(NamedTuple):
    """A run of bytes inside a record."""

    offset: int
    size: int


class ExpertBits(NamedTuple):
    """Bits per weight of an expert's two matrices: 2, 3, 4, 5, 6, 8 or 16 (raw bfloat16)."""

    up: int
    down: int


@dataclass(frozen=True)
class MatrixLayout:
    """One matrix of a record: its shape, its bits, and its sections."""

    name: str
    out_features: int
    in_features: int
    bits: int
    planes: tuple[Section, ...]
    norms: Section | None
    codebook: Section | None

    @property
    def size(self) -> int:
        """Bytes of its sections, without what aligns them."""
        return sum(section.size for section in (*self.planes, self.norms, self.codebook) if section)

    def view(self, record: Tensor) -> PackedMatrix:
        """The matrix inside `record` (uint8, 1-D) without copying."""
        planes = tuple(_run(record, section).view(self.out_features, -1) for section in self.planes)
        norms = codebook = None
        if self.norms is not None and self.codebook is not None:
            norms = _run(record, self.norms).view(torch.float16).view(self.out_features, -1)
            codebook = _run(record, self.codebook).view(torch.float32)
        return PackedMatrix(self.bits, self.in_features, planes, norms, codebook)

    def store(self, matrix: PackedMatrix, record: Tensor, rows: slice = slice(None)) -> None:
        """Copy `matrix`, which is those rows, into its sections of `record`; shapes must be this layout's."""
        target = self.view(record)
        assert matrix.bits == self.bits and matrix.in_features == self.in_features, "matrix of another layout"
        for source, plane in zip(matrix.planes, target.planes, strict=True):
            plane[rows].copy_(source)
        if target.norms is not None and target.codebook is not None:
            assert matrix.norms is not None and matrix.codebook is not None
            target.norms[rows].copy_(matrix.norms)
            target.codebook.copy_(matrix.codebook)


@dataclass(frozen=True)
class RecordLayout:
    """Where the up and down projections of one layer's experts lie in their records."""

    up: MatrixLayout
    down: MatrixLayout
    size: int  # bytes in use, a multiple of 4096

    @property
    def matrices(self) -> tuple[MatrixLayout, MatrixLayout]:
        return self.up, self.down


@dataclass(frozen=True)
class RecordLayouts:
    """The layout of every layer's records, and the one stride that holds them all."""

    layers: tuple[RecordLayout, ...]

    def __getitem__(self, layer: int) -> RecordLayout:
        return self.layers[layer]

    @property
    def stride(self) -> int:
        return max(layout.size for layout in self.layers)

    @property
    def bits(self) -> tuple[ExpertBits, ...]:
        return tuple(ExpertBits(layout.up.bits, layout.down.bits) for layout in self.layers)

    @property
    def digest(self) -> str:
        """Hash of everything that decides where a byte lies; peers compare it, nobody guesses."""
        described = json.dumps({"format": RECORD_FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:32]


def record_layouts(config: ModelConfig, bits: Sequence[ExpertBits]) -> RecordLayouts:
    """The layouts of this model's records, `bits` layer by layer; ConfigError for bits that cannot be."""
    assert len(bits) == config.num_layers
    # Layers of the same bits share one object, which keeps the description of a large model small in memory.
    unique = {pair: _record_layout(config, pair) for pair in dict.fromkeys(bits)}
    return RecordLayouts(tuple(unique[pair] for pair in bits))


def matrix_layout(name: str, out_features: int, in_features: int, bits: int) -> tuple[MatrixLayout, int]:
    """The layout of one matrix that stands alone, and its size in bytes."""
    (layout,), size = _lay_out([(name, out_features, in_features, bits)])
    return layout, size


def _record_layout(config: ModelConfig, bits: ExpertBits) -> RecordLayout:
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    (up, down), size = _lay_out(
        [("up_proj", intermediate, hidden, bits.up), ("down_proj", hidden, intermediate, bits.down)]
    )
    return RecordLayout(up, down, _align(size, STRIDE_ALIGNMENT))


def _lay_out(specs: list[tuple[str, int, int, int]]) -> tuple[list[MatrixLayout], int]:
    """(name, rows, columns, bits) of some matrices to their layouts in one run of bytes, and its size."""
    cursor = 0

    def section(size: int) -> Section:
        nonlocal cursor
        placed = Section(cursor, size)
        cursor = _align(cursor + size, SECTION_ALIGNMENT)
        return placed

    planes = [
        tuple(section(rows * size) for size in _plane_bytes(columns, bits))
        for _, rows, columns, bits in specs
    ]
    norms = [
        None if bits == RAW_BITS else section(rows * padded(columns) // BLOCK * 2)
        for _, rows, columns, bits in specs
    ]
    codebooks = [None if bits == RAW_BITS else section(4 << bits) for *_, bits in specs]
    layouts = [
        MatrixLayout(*spec, *sections)
        for spec, sections in zip(specs, zip(planes, norms, codebooks, strict=True), strict=True)
    ]
    return layouts, cursor


def _plane_bytes(columns: int, bits: int) -> list[int]:
    """Bytes of one row in each plane."""
    check_bits(bits)
    if bits == RAW_BITS:
        return [columns * 2]
    return [padded(columns) * width // 8 for width in PLANE_WIDTHS[bits]]


def _run(record: Tensor, section: Section) -> Tensor:
    return record[section.offset : section.offset + section.size]


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
