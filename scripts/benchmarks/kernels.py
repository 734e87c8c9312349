"""HLWQ kernels: quantizing and decoding against the published tool's algorithms, products against memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import published_tool
import torch
from checkpoint import HIDDEN, INTERMEDIATE
from measure import Comparison, Figure, compare
from torch import Tensor

from common.hlwq import native
from common.hlwq.codebook import packing_codebook, published_codebook
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import PLANE_WIDTHS
from common.hlwq.quantize import pack_matrix

BITS = 5
WEIGHTS = INTERMEDIATE * HIDDEN
MATRICES = 48  # 156 MB of packed weights: far beyond any cache


def benchmark() -> Iterator[Comparison | Figure]:
    """Rates in MB of bfloat16 weights, or in G weights/s."""
    yield from _codec()
    yield from _products()
    yield from _accuracy()


def _codec() -> Iterator[Comparison]:
    weight = torch.randn(INTERMEDIATE, HIDDEN).bfloat16()
    codebook = packing_codebook(BITS)
    codes, norms = published_tool.quantize(weight, codebook)
    mine = pack_matrix(weight, BITS, codebook)
    assert float((mine.codes().view(-1, 128) != codes).float().mean()) < 1e-4, "the quantizers disagree"
    packed, rows = published_tool.pack_q5(codes.view(INTERMEDIATE, -1)), norms.view(INTERMEDIATE, -1)
    decoded = published_tool.decode_q5(packed, rows, codebook)
    assert (
        float((mine.decode(torch.bfloat16).float() - decoded.float()).norm() / decoded.float().norm()) < 1e-3
    )
    size = weight.nbytes / 1e6
    argmin = ("broadcast argmin over 32 levels", lambda: published_tool.quantize(weight, codebook))
    for what, fit in (("quantizing, norms fitted", True), ("quantizing, plain norms", False)):
        ours = ("pack_matrix", lambda fit=fit: pack_matrix(weight, BITS, codebook, fit_norms=fit))
        yield compare(what, ours, argmin, size, "MB/s", 10.0, pairs=5)
    chunks = (
        "unpack, look up and rotate by chunks",
        lambda: published_tool.decode_q5(packed, rows, codebook),
    )
    yield compare("decoding", ("decode", lambda: mine.decode(torch.bfloat16)), chunks, size, "MB/s", 10.0)


def _products() -> Iterator[Comparison | Figure]:
    cores = len(os.sched_getaffinity(0))
    matrices = [_random_matrix(BITS) for _ in range(MATRICES)]
    memory = torch.ones(sum(matrix.nbytes for matrix in matrices) // 4)
    for rows, threads in ((1, 1), (1, cores), (6, cores), (16, cores)):
        native.set_threads(threads)
        torch.set_num_threads(threads)
        x = torch.randn(rows, HIDDEN)
        used = matrices if rows == 1 else matrices[: MATRICES // rows]
        amount = len(used) * WEIGHTS * rows / 1e9
        ours = ("product", lambda x=x, used=used: [matrix.product(x) for matrix in used])
        if rows == 1:
            # A ratio of 1 would be weights read as fast as memory is.
            what = f"product, 1 row, {threads} cores, against reading its bytes"
            yield compare(what, ours, ("sum of as many bytes", memory.sum), amount, "G weights/s", 0.5)
        else:
            yield Figure.median(
                f"product, {rows} rows, {threads} cores", ours[1], amount, "G multiplications/s"
            )
    native.set_threads(cores)
    torch.set_num_threads(cores)


def _accuracy() -> Iterator[Figure]:
    """Relative error of one row's product against float64, worst of the paths' codebooks."""
    x = torch.randn(1, HIDDEN)
    for path in native.PATHS:
        for name, codebook in (("own", packing_codebook), ("published", published_codebook)):
            matrix = pack_matrix(torch.randn(256, HIDDEN), BITS, codebook(BITS))
            with native.forced(native.PLAIN):
                weights = PackedMatrix.decode(matrix).double()
            expected = x.double() @ weights.T
            try:
                with native.forced(path):
                    error = float((matrix.product(x) - expected).norm() / expected.norm())
            except Exception:  # noqa: BLE001 (this processor has no such path)
                continue
            yield Figure(f"error of the {path} path, {name} codebook", error, "of the norm")


def _random_matrix(bits: int) -> PackedMatrix:
    blocks = -(-HIDDEN // 128)
    planes: tuple[Tensor, ...] = tuple(
        torch.randint(256, (INTERMEDIATE, blocks * 16 * width), dtype=torch.uint8)
        for width in PLANE_WIDTHS[bits]
    )
    norms = torch.rand(INTERMEDIATE, blocks).half() + 0.5
    return PackedMatrix(bits, HIDDEN, planes, norms, packing_codebook(bits))
