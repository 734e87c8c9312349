"""Bytes of weights that decoding needs, and the least time in which memory could deliver them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import machine
from measure import Figure, rates
from synthetic import marked

from common.checkpoint import PackedCheckpoint
from common.checkpoint.names import packable_dense
from common.hlwq.planes import RAW_BITS
from common.record import matrix_layout

_MEMORY_BYTES = 512 << 20


def dense_bytes(checkpoint: PackedCheckpoint, dense_bits: int | None = None) -> dict[str, int]:
    """Size of every dense weight by name, as stored or as a worker with --dense-bits keeps it."""
    sizes = {name: stored.size for name, stored in checkpoint.dense_stored.items()}
    for name in packable_dense(checkpoint.config) if dense_bits is not None else ():
        rows, columns = checkpoint.dense_stored[name].shape
        packed = matrix_layout(name, rows, columns, dense_bits)[1] if dense_bits != RAW_BITS else None
        sizes[name] = math.prod((2, rows, columns)) if packed is None else packed
    return sizes


def bytes_a_token(checkpoint: PackedCheckpoint, dense_bits: int | None = None) -> int:
    """What decoding one token reads of weights: chosen experts, dense weights, not the embeddings."""
    config = checkpoint.config
    routed = config.num_layers * config.num_experts_per_tok * checkpoint.layout.stride
    dense = dense_bytes(checkpoint, dense_bits)
    return routed + sum(size for name, size in dense.items() if "embeddings" not in name)


def roofline(
    checkpoint: PackedCheckpoint, decode_seconds: float, dense_bits: int | None = None
) -> Iterator[Figure]:
    """The least time of a token by the measured read bandwidth of all cores, and the share of it reached."""
    memory = machine.Memory(_MEMORY_BYTES)
    bandwidth = Figure.median(
        f"reading memory, {machine.cores()} cores", rates(memory.read, memory.size / 1e9), "GB/s"
    )
    needed = bytes_a_token(checkpoint, dense_bits) / 1e9
    least = needed / bandwidth.value
    yield bandwidth
    yield Figure(marked("packed weights read a token", checkpoint), needed, "GB")
    yield Figure(marked("least time of a token: these over that", checkpoint), 1e3 * least, "ms")
    yield Figure(marked("measured time of a token", checkpoint), 1e3 * decode_seconds, "ms")
    yield Figure(marked("share of the roofline reached", checkpoint), 100 * least / decode_seconds, "%")
