"""Matrices to what a plan wants of them, and experts to records, several at a time, handed out in order.

Owns the parallelism of packing and names the matrix whose weights cannot be packed; what becomes of the
records is the caller's affair. One thread an expert with one thread inside each product is as fast as the
reverse on an idle machine and several times faster on a busy one, where every small operation would wait for
the slowest core. Memory holds a few experts, and what quantizing a few rows takes, whatever the model's size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from common.checkpoint.calibration import Calibration
from common.checkpoint.names import expert_names
from common.checkpoint.source import Matrix, WeightSource
from common.errors import CheckpointError
from common.expert_key import ExpertKey
from common.hlwq import native
from common.hlwq.calibrated import Moment, error_feedback, feedback_memory, pack_calibrated
from common.hlwq.codebook import packing_codebook, published_codebook
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import RAW_BITS
from common.hlwq.quantize import pack_matrix
from common.record import MatrixLayout, RecordLayouts

T = TypeVar("T")

# Codebooks to quantize with, by name: the best there is, and the one that layouts without a codebook imply.
CONVERGED, PUBLISHED = "converged", "published"
CODEBOOKS = {CONVERGED: packing_codebook, PUBLISHED: published_codebook}

_WEIGHTS_AT_ONCE = 1 << 20
_CALIBRATED_AT_ONCE = 1 << 22  # more, because columns are rounded one by one whatever their length
_MEMORY = 1 << 30  # bytes of all that is in flight
_MEMORY_OF_ROWS = 48 * _WEIGHTS_AT_ONCE  # of quantizing so many weights in PyTorch, all intermediates counted
_MEMORY_OF_CALIBRATED_ROWS = 28 * _CALIBRATED_AT_ONCE


class Quantization(NamedTuple):
    """How one matrix is quantized: by one of CODEBOOKS, and for its inputs if their `feedback` is given."""

    codebook: str = CONVERGED
    feedback: Tensor | None = None


_DEFAULT = Quantization()


def packed(matrix: Matrix, bits: int, quantization: Quantization = _DEFAULT) -> PackedMatrix:
    """`matrix` at `bits`: as it is when it has them already, else decoded if need be, and quantized anew."""
    if isinstance(matrix, PackedMatrix):
        if matrix.bits == bits:
            return matrix
        matrix = matrix.decode(torch.bfloat16 if bits == RAW_BITS else torch.float32)
    if bits == RAW_BITS:
        return pack_matrix(matrix, bits, None)
    codebook = CODEBOOKS[quantization.codebook](bits)
    if quantization.feedback is not None:
        return pack_calibrated(matrix, bits, codebook, quantization.feedback)
    return pack_matrix(matrix, bits, codebook, fit_norms=True)


def quantizes(matrix: Matrix, bits: int) -> bool:
    """Whether `packed` would quantize, not just carry over or round to bfloat16."""
    return bits != RAW_BITS and not (isinstance(matrix, PackedMatrix) and matrix.bits == bits)


def unpacked(matrix: Matrix) -> Tensor:
    """`matrix` plain: as it is, or decoded to bfloat16."""
    return matrix.decode(torch.bfloat16) if isinstance(matrix, PackedMatrix) else matrix


def row_slices(matrix: Matrix, calibrated: bool = False) -> list[slice]:
    """The rows of `matrix` in pieces small enough to be worked on by every thread at once."""
    rows, columns = matrix.shape
    at_once = max(1, (_CALIBRATED_AT_ONCE if calibrated else _WEIGHTS_AT_ONCE) // max(1, columns))
    return [slice(start, start + at_once) for start in range(0, rows, at_once)]


def rows_of(matrix: Matrix, rows: slice) -> Matrix:
    """Some rows of `matrix`, as views."""
    return matrix.rows(rows) if isinstance(matrix, PackedMatrix) else matrix[rows]


def pack_rows(
    matrix: Matrix, layout: MatrixLayout, record: Tensor, quantization: Quantization, rows: slice
) -> None:
    """Pack some rows of `matrix` into their places in `record`."""
    layout.store(packed(rows_of(matrix, rows), layout.bits, quantization), record, rows)


def memory_of_rows(calibrated: bool) -> int:
    """Bytes that packing one of the `row_slices` takes."""
    return _MEMORY_OF_CALIBRATED_ROWS if calibrated else _MEMORY_OF_ROWS


def packed_records(
    source: WeightSource,
    layouts: RecordLayouts,
    calibration: Calibration | None,
    codebook: str,
    keys: Sequence[ExpertKey],
) -> Generator[Tensor, None, None]:
    """The records of `keys`, uint8 (stride,), in their order; see `in_order`."""
    experts = source.config.num_layers * source.config.n_routed_experts
    # One expert read and one record made in each thread, and two finished records waiting for each.
    each = source.routed_bytes // experts + 3 * layouts.stride + _MEMORY_OF_ROWS
    if calibration is not None:
        columns = max(source.config.hidden_size, source.config.moe_intermediate_size)
        each += feedback_memory(columns) + memory_of_rows(True)
    return in_order((partial(_record, source, layouts, calibration, codebook, key) for key in keys), each)


def in_order(jobs: Iterable[Callable[[], T]], each: int = _MEMORY_OF_ROWS) -> Generator[T, None, None]:
    """What `jobs` return, in their order, several done at a time; only a few results exist at any time.

    As many threads as torch has, or fewer where memory would not do: `each` bytes for one with its job and
    two waiting results. Until the generator is exhausted or closed, whoever computes does so on one thread.
    """
    with native.one_thread() as before:
        threads = max(1, min(before, _MEMORY // each))
        pool = ThreadPoolExecutor(threads, "packing")
        pending: deque[Future[T]] = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(job))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _record(
    source: WeightSource,
    layouts: RecordLayouts,
    calibration: Calibration | None,
    codebook: str,
    key: ExpertKey,
) -> Tensor:
    record = torch.zeros(layouts.stride, dtype=torch.uint8)  # zero between sections, so always the same bytes
    matrices, layout = source.expert(key), layouts[key.layer].matrices
    moments = _moments(calibration, key, matrices, layout)
    parts = zip(layout, matrices, expert_names(source.config, key), moments, strict=True)
    for place, matrix, name, moment in parts:
        try:
            feedback = None if moment is None else error_feedback(moment)
            for rows in row_slices(matrix, feedback is not None):
                pack_rows(matrix, place, record, Quantization(codebook, feedback), rows)
        except CheckpointError as error:
            raise CheckpointError(f"{source.directory}: {name}: {error}") from None
    return record


def _moments(
    calibration: Calibration | None,
    key: ExpertKey,
    matrices: tuple[Matrix, Matrix],
    layout: tuple[MatrixLayout, MatrixLayout],
) -> list[Moment | None]:
    """Of the inputs of those that are quantized."""
    wanted = [quantizes(matrix, place.bits) for matrix, place in zip(matrices, layout, strict=True)]
    if calibration is None or not any(wanted):
        return [None, None]
    moments = calibration.expert(key, unpacked(matrices[0]))
    return [moment if use else None for moment, use in zip(moments, wanted, strict=True)]
