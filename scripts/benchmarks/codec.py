"""Quantizing and decoding against the published tool's algorithms, on a matrix of the 30B's experts.

Rates are MB/s of bfloat16 weights. Decoding is done as loading a checkpoint does it, matrix after matrix; the
published Q5 layout is read by both sides from one file, which lies in the page cache.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import published_tool
import torch
from measure import Comparison, compare
from safetensors.torch import load_file, save_file
from synthetic import HIDDEN, INTERMEDIATE
from torch import Tensor

from common.checkpoint.polar_config import Claims
from common.checkpoint.published import PublishedMatrix
from common.checkpoint.published_form import tell_form
from common.checkpoint.shards import Place
from common.checkpoint.tensor_file import TensorFile
from common.hlwq.codebook import packing_codebook
from common.hlwq.planes import BLOCK
from common.hlwq.quantize import pack_matrix

BITS = 5
_PARTS = ("codes", "norms", "ct_scaled")
_MATRICES = 8  # decoded in a row

Parts = tuple[Tensor, Tensor, Tensor]


def benchmark() -> Iterator[Comparison]:
    """Both ways of quantizing; decoding own planes and the published layout."""
    weight = torch.randn(INTERMEDIATE, HIDDEN).bfloat16()
    codebook = packing_codebook(BITS)
    yield from _quantizing(weight, codebook)
    yield from _decoding(weight, codebook)


def _quantizing(weight: Tensor, codebook: Tensor) -> Iterator[Comparison]:
    codes, _ = published_tool.quantize(weight, codebook)
    mine = pack_matrix(weight, BITS, codebook)
    assert float((mine.codes().view(-1, BLOCK) != codes).float().mean()) < 1e-4, "the quantizers disagree"
    theirs = ("broadcast argmin over 32 levels", lambda: published_tool.quantize(weight, codebook))
    for what, fit in (("quantizing, norms fitted", True), ("quantizing, plain norms", False)):
        ours = ("pack_matrix", lambda fit=fit: pack_matrix(weight, BITS, codebook, fit_norms=fit))
        yield compare(what, ours, theirs, weight.nbytes / 1e6, "MB/s", 10.0, pairs=5)


def _decoding(weight: Tensor, codebook: Tensor) -> Iterator[Comparison]:
    matrix, size = pack_matrix(weight, BITS, codebook), _MATRICES * weight.nbytes / 1e6
    assert matrix.norms is not None
    tensors = published_tool.pack_q5(matrix.codes()), matrix.norms, codebook / math.sqrt(BLOCK)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "published.safetensors"
        parts = {f"{i}.{part}": tensor.clone() for i in range(_MATRICES) for part, tensor in _named(tensors)}
        save_file(parts, path)
        for mine, expected in zip(_read_ours(path), _read_theirs(path), strict=True):
            assert float((mine.float() - expected.float()).norm() / expected.float().norm()) < 1e-3
        ours = ("PackedMatrix.decode", lambda: _all(matrix.decode(torch.bfloat16) for _ in range(_MATRICES)))
        chunks = (
            "unpack, look up, rotate by chunks",
            lambda: _all(published_tool.decode_q5(*tensors) for _ in range(_MATRICES)),
        )
        yield compare("decoding own planes", ours, chunks, size, "MB/s", 10.0)
        ours = ("PublishedMatrix.decode", lambda: _all(_read_ours(path)))
        theirs = ("load_file; unpack, look up, rotate by chunks", lambda: _all(_read_theirs(path)))
        yield compare("decoding the published Q5 layout from its file", ours, theirs, size, "MB/s", 10.0)


def _named(tensors: Parts) -> Iterator[tuple[str, Tensor]]:
    return zip(_PARTS, tensors, strict=True)


def _all(matrices: Iterable[Tensor]) -> None:
    """None of them is kept."""
    deque(matrices, maxlen=0)


def _read_ours(path: Path) -> Iterator[Tensor]:
    """As checkpoints are read: told from headers, checked, into planes, decoded."""
    file = TensorFile(path)
    for i in range(_MATRICES):
        parts = {part: Place(file, f"{i}.{part}") for part in _PARTS}
        yield PublishedMatrix(tell_form(parts, (INTERMEDIATE, HIDDEN), Claims(None, None))).decode()


def _read_theirs(path: Path) -> Iterator[Tensor]:
    tensors = load_file(path)
    for i in range(_MATRICES):
        packed, norms, scaled = (tensors[f"{i}.{part}"] for part in _PARTS)
        yield published_tool.decode_q5(packed, norms, scaled)
