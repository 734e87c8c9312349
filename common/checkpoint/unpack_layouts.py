"""What a checkpoint holds of one weight in each layout that `unpack` writes: its tensors, and their bytes.

Plain BF16, or one of two published HLWQ layouts, which take codes, norms and codebook as they are: nothing is
quantized again. Matrices of 16 bits and weights that are stored plain are plain in all three. Where tensors
come to lie is the affair of `unpack_shards`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from common.checkpoint.packing import row_slices
from common.checkpoint.source import Matrix, Stored
from common.checkpoint.tensor_file import TensorInfo
from common.errors import ConfigError
from common.hlwq.codebook import published_codebook
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK, RAW_BITS, pack_planes, padded

BF16, HLWQ_Q5, POLAR_ENGINE_V5 = "bf16", "hlwq-q5", "polar_engine_v5"


class Part(NamedTuple):
    """One tensor of a weight: its name, its form, and how its data come from the weight, run after run."""

    name: str
    info: TensorInfo
    runs: Callable[[Matrix], Iterator[Tensor]]


def bf16_parts(name: str, stored: Stored) -> list[Part]:
    """The weight itself: as it is stored, or decoded."""
    if stored.bits is None:
        return [Part(name, TensorInfo(stored.dtype, stored.shape), _as_stored)]
    return [Part(name, TensorInfo("BF16", stored.shape), _decoded)]


def hlwq_q5_parts(name: str, stored: Stored) -> list[Part]:
    """The layout "HLWQ packed": all codes in one run, most significant bit first; the codebook is implied.

    Raises ConfigError, and so do the runs, with what is wrong with the weight that it cannot carry.
    """
    if stored.bits in (None, RAW_BITS):
        return bf16_parts(name, stored)
    if stored.bits != 5:
        raise ConfigError(
            f"has codes of {stored.bits} bits, and {HLWQ_Q5} can carry those of 5 alone: "
            f"choose {POLAR_ENGINE_V5}, which carries all"
        )
    rows, blocks, codes = _sizes(stored)
    meta = [rows, blocks, BLOCK, codes, stored.shape[1]]
    return [
        Part(f"{name}__packed", TensorInfo("U8", (codes * 5 // 8,)), _most_significant_first),
        Part(f"{name}__norms", TensorInfo("F16", (rows, blocks)), _norms),
        Part(f"{name}__meta", TensorInfo("I64", (len(meta),)), lambda _: iter([torch.tensor(meta)])),
    ]


def polar_engine_parts(name: str, stored: Stored) -> list[Part]:
    """The layouts of `polar_engine_v5`: up to 4 bits as nibbles, 5 as Q5 packed, more as a code a byte.

    Codes above 127, which 8 bits have, do not fit the layout's int8: these are uint8, which readers tell from
    Q5 packed by the shape.
    """
    if stored.bits in (None, RAW_BITS):
        return bf16_parts(name, stored)
    rows, blocks, codes = _sizes(stored)
    columns, name = codes // rows, matrix_key(name)
    if stored.bits <= 4:
        coded = TensorInfo("U8", (rows, columns // 2)), _nibbles
    elif stored.bits == 5:
        coded = TensorInfo("U8", (rows, columns * 5 // 8)), _least_significant_first
    else:
        coded = TensorInfo("U8" if stored.bits == 8 else "I8", (rows, columns)), _one_a_byte
    return [
        Part(f"{name}.codes", *coded),
        Part(f"{name}.norms", TensorInfo("F16", (rows, blocks)), _norms),
        Part(f"{name}.ct_scaled", TensorInfo("F32", (1 << stored.bits,)), _scaled_codebook),
    ]


LAYOUTS: dict[str, Callable[[str, Stored], list[Part]]] = {
    BF16: bf16_parts,
    HLWQ_Q5: hlwq_q5_parts,
    POLAR_ENGINE_V5: polar_engine_parts,
}


def matrix_key(name: str) -> str:
    """What published layouts call a matrix: its name without `.weight`."""
    return name.removesuffix(".weight")


def polar_entry(stored: Stored) -> dict[str, int | bool]:
    """What `polar_config.json` says of one matrix of codes."""
    assert stored.bits is not None
    rows, blocks, codes = _sizes(stored)
    return {
        "in_features": stored.shape[1],
        "out_features": rows,
        "in_features_padded": codes // rows,
        "n_blocks": blocks,
        "bits": stored.bits,
        "block_size": BLOCK,
        "packed": stored.bits <= 4,
        "packed_q5": stored.bits == 5,
    }


def _sizes(stored: Stored) -> tuple[int, int, int]:
    """Rows, blocks in a row, and codes in all, padding included."""
    rows, columns = stored.shape
    return rows, padded(columns) // BLOCK, rows * padded(columns)


def _as_stored(matrix: Matrix) -> Iterator[Tensor]:
    assert isinstance(matrix, Tensor)
    yield matrix


def _decoded(matrix: Matrix) -> Iterator[Tensor]:
    return (rows.decode(torch.bfloat16) for rows in _some_rows_at_a_time(matrix))


def _most_significant_first(matrix: Matrix) -> Iterator[Tensor]:
    assert isinstance(matrix, PackedMatrix) and matrix.codebook is not None
    if not torch.equal(matrix.codebook, published_codebook(matrix.bits)):
        raise ConfigError(
            f"has a codebook of its own, and {HLWQ_Q5} carries none and implies the published one: "
            f"choose {POLAR_ENGINE_V5}, which carries it, or pack the original with --codebook published"
        )
    return (_five_bits(rows.codes(), True) for rows in _some_rows_at_a_time(matrix))


def _least_significant_first(matrix: Matrix) -> Iterator[Tensor]:
    return (_five_bits(rows.codes(), False) for rows in _some_rows_at_a_time(matrix))


def _nibbles(matrix: Matrix) -> Iterator[Tensor]:
    # A plane of 4 bits is the published layout byte for byte; narrower codes leave upper bits empty.
    return (pack_planes(rows.codes(), 4)[0] for rows in _some_rows_at_a_time(matrix))


def _one_a_byte(matrix: Matrix) -> Iterator[Tensor]:
    return (rows.codes() for rows in _some_rows_at_a_time(matrix))


def _norms(matrix: Matrix) -> Iterator[Tensor]:
    assert isinstance(matrix, PackedMatrix) and matrix.norms is not None
    yield matrix.norms


def _scaled_codebook(matrix: Matrix) -> Iterator[Tensor]:
    assert isinstance(matrix, PackedMatrix) and matrix.codebook is not None
    yield (matrix.codebook.double() / math.sqrt(BLOCK)).float()


def _some_rows_at_a_time(matrix: Matrix) -> Iterator[PackedMatrix]:
    assert isinstance(matrix, PackedMatrix)
    for rows in row_slices(matrix):
        yield matrix.rows(rows)


def _five_bits(codes: Tensor, most_significant_first: bool) -> Tensor:
    """Codes (rows, columns) uint8, columns a multiple of 8 -> bytes (rows, columns * 5 / 8).

    Neighbouring lanes are joined into lanes twice as wide, until 8 codes are one number of 40 bits.
    """
    lanes, width = codes.contiguous().view(torch.int64), 5  # little-endian: code 0 in the lowest byte
    for lane, mask in ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF)):
        first, second = lanes & mask, (lanes >> lane) & mask
        lanes = (first << width) | second if most_significant_first else first | (second << width)
        width *= 2
    run = lanes.view(torch.uint8).view(codes.shape[0], -1, 8)[:, :, :5]
    return (run.flip(2) if most_significant_first else run).reshape(codes.shape[0], -1)
