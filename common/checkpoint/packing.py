"""Experts to records: quantize the experts of a checkpoint, several at a time, and hand them out in order.

Owns the parallelism of packing and names the expert whose weights cannot be packed; what becomes of the
records is the caller's affair. One thread an expert with one thread inside each product is as fast as the
reverse on an idle machine and several times faster on a busy one, where every small operation would wait for
the slowest core.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product

import torch
from torch import Tensor

from common.checkpoint.huggingface import HuggingFaceCheckpoint
from common.checkpoint.names import expert_names
from common.errors import CheckpointError
from common.expert_key import ExpertKey
from common.hlwq.codebook import converged_codebook
from common.hlwq.planes import RAW_BITS
from common.hlwq.quantize import pack_matrix
from common.record import RecordLayout


def codebook(bits: int) -> Tensor | None:
    """The codebook that packing uses, float32 (2**bits,); none for raw bfloat16."""
    return None if bits == RAW_BITS else converged_codebook(bits)


def packed_records(source: HuggingFaceCheckpoint, layout: RecordLayout) -> Generator[Tensor, None, None]:
    """Every record, uint8 (stride,), layer by layer and expert by expert; only a few exist at any time.

    Until the generator is exhausted or closed, torch runs with one thread in this process.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, "packing")
    pending: deque[Future[Tensor]] = deque()
    try:
        for layer, expert in product(range(source.config.num_layers), range(source.config.n_routed_experts)):
            pending.append(pool.submit(_record, source, layout, ExpertKey(layer, expert)))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _record(source: HuggingFaceCheckpoint, layout: RecordLayout, key: ExpertKey) -> Tensor:
    record = torch.zeros(layout.stride, dtype=torch.uint8)  # zero between sections, so always the same bytes
    parts = zip(layout.matrices, source.expert(key), expert_names(source.config, key), strict=True)
    for matrix, weight, name in parts:
        try:
            matrix.store(pack_matrix(weight, matrix.bits, codebook(matrix.bits)), record)
        except CheckpointError as error:
            raise CheckpointError(f"{source.directory}: {name}: {error}") from None
    return record
