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
from typing import TypeVar

import torch
from torch import Tensor

from common.checkpoint.names import expert_names
from common.checkpoint.source import Matrix, WeightSource
from common.errors import CheckpointError
from common.expert_key import ExpertKey
from common.hlwq.codebook import packing_codebook
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import RAW_BITS
from common.hlwq.quantize import pack_matrix
from common.record import MatrixLayout, RecordLayouts

T = TypeVar("T")

_WEIGHTS_AT_ONCE = 1 << 20
_MEMORY = 1 << 30  # bytes of all that is in flight
_MEMORY_OF_ROWS = 48 * _WEIGHTS_AT_ONCE  # of quantizing so many weights in PyTorch, all intermediates counted


def packed(matrix: Matrix, bits: int) -> PackedMatrix:
    """`matrix` at `bits`: as it is when it has them already, else decoded if need be, and quantized anew."""
    if isinstance(matrix, PackedMatrix):
        if matrix.bits == bits:
            return matrix
        matrix = matrix.decode(torch.bfloat16 if bits == RAW_BITS else torch.float32)
    return pack_matrix(matrix, bits, None if bits == RAW_BITS else packing_codebook(bits), fit_norms=True)


def unpacked(matrix: Matrix) -> Tensor:
    """`matrix` plain: as it is, or decoded to bfloat16."""
    return matrix.decode(torch.bfloat16) if isinstance(matrix, PackedMatrix) else matrix


def row_slices(matrix: Matrix) -> list[slice]:
    """The rows of `matrix` in pieces small enough to be worked on by every thread at once."""
    rows, columns = matrix.shape
    at_once = max(1, _WEIGHTS_AT_ONCE // max(1, columns))
    return [slice(start, start + at_once) for start in range(0, rows, at_once)]


def rows_of(matrix: Matrix, rows: slice) -> Matrix:
    """Some rows of `matrix`, as views."""
    return matrix.rows(rows) if isinstance(matrix, PackedMatrix) else matrix[rows]


def pack_rows(matrix: Matrix, layout: MatrixLayout, record: Tensor, rows: slice) -> None:
    """Pack some rows of `matrix` into their places in `record`."""
    layout.store(packed(rows_of(matrix, rows), layout.bits), record, rows)


def packed_records(
    source: WeightSource, layouts: RecordLayouts, keys: Sequence[ExpertKey]
) -> Generator[Tensor, None, None]:
    """The records of `keys`, uint8 (stride,), in their order; see `in_order`."""
    experts = source.config.num_layers * source.config.n_routed_experts
    # One expert read and one record made in each thread, and two finished records waiting for each.
    each = source.routed_bytes // experts + 3 * layouts.stride + _MEMORY_OF_ROWS
    return in_order((partial(_record, source, layouts, key) for key in keys), each)


def in_order(jobs: Iterable[Callable[[], T]], each: int = _MEMORY_OF_ROWS) -> Generator[T, None, None]:
    """What `jobs` return, in their order, several done at a time; only a few results exist at any time.

    As many threads as torch has, or fewer where memory would not do: `each` bytes for one with its job and
    two waiting results. Until the generator is exhausted or closed, torch runs with one thread here.
    """
    before = torch.get_num_threads()
    threads = max(1, min(before, _MEMORY // each))
    torch.set_num_threads(1)
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
        torch.set_num_threads(before)


def _record(source: WeightSource, layouts: RecordLayouts, key: ExpertKey) -> Tensor:
    record = torch.zeros(layouts.stride, dtype=torch.uint8)  # zero between sections, so always the same bytes
    parts = zip(
        layouts[key.layer].matrices, source.expert(key), expert_names(source.config, key), strict=True
    )
    for layout, matrix, name in parts:
        try:
            for rows in row_slices(matrix):
                pack_rows(matrix, layout, record, rows)
        except CheckpointError as error:
            raise CheckpointError(f"{source.directory}: {name}: {error}") from None
    return record
