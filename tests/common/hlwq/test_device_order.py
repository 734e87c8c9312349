"""Experts in the order of a GPU worker's kernels: every path that has it has the bits of a twin in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from common.hlwq import native
from common.hlwq.codebook import converged_codebook
from common.hlwq.hadamard import hadamard_matrix
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK, PLANE_WIDTHS, padded
from common.hlwq.quantize import pack_matrix
from common.model_config import ModelConfig
from common.record import ExpertBits, RecordLayout, record_layouts
from gpu_worker.kernels.expert_lane import device_experts
from tests.helpers.models import tiny_config
from tests.helpers.native_paths import forced_or_skipped

Floats = NDArray[Any]  # float32 unless said otherwise


pytestmark = pytest.mark.skipif(native.path() in (native.PLAIN, "portable"), reason="takes AVX2 or AVX-512")


@pytest.fixture(params=[path for path in native.PATHS if path != "portable"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """One path after the other; a processor without AVX-512 or AVX2 has fewer."""
    with forced_or_skipped(request.param) as path:
        yield path


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c, rounded once.

    In float64 the product is exact. The sum is rounded to odd there: to the neighbour of odd significand
    unless it is exact, which two-sum's error tells. Rounding that to float32, of fewer than half as many
    digits, is rounding the exact sum (Boldo and Melquiond, 2008).
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (total.view(np.int64) & 1) == 0
    odd = np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total)
    return odd.astype(np.float32)


def rotated(x: Floats) -> Floats:
    """x (columns,) to (blocks, 128) in order: butterflies of strides 1 to 64, then times 1 / 128."""
    values = np.zeros((padded(len(x)) // BLOCK, BLOCK), np.float32)
    values.reshape(-1)[: len(x)] = x
    stride = 1
    while stride < BLOCK:
        pairs = values.reshape(len(values), -1, 2, stride)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        values = np.stack([low + high, low - high], axis=2).reshape(len(values), BLOCK)
        stride *= 2
    ordered = np.empty_like(values)
    for b in range(4):
        for h in range(2):
            for w in range(16):
                ordered[:, (2 * b + h) * 16 + w] = values[:, 64 * h + 4 * w + b] * np.float32(1 / 128)
    return ordered


def product(matrix: PackedMatrix, x: Floats) -> Floats:
    """y (out,) for x (blocks, 128) in the products' order, addition by addition."""
    assert matrix.norms is not None and matrix.codebook is not None
    outs, blocks = matrix.shape[0], len(x)
    with native.forced(native.PLAIN):
        codes = matrix.codes().numpy().reshape(outs, blocks, BLOCK)
    weights, norms = matrix.codebook.numpy()[codes], matrix.norms.float().numpy()
    sums = np.zeros((outs, blocks, 16), np.float32)
    for h in range(2):
        for b in range(4):
            place = (2 * b + h) * 16
            sums = fma(weights[:, :, 64 * h + b : 64 * h + 64 : 4], x[:, place : place + 16], sums)
    quads = sums.reshape(outs, blocks, 4, 4)
    quads = ((quads[..., 0] + quads[..., 1]) + quads[..., 2]) + quads[..., 3]
    whole = -(-blocks // 8) * 8
    quads = np.pad(quads, ((0, 0), (0, whole - blocks), (0, 0)))
    norms = np.pad(norms, ((0, 0), (0, whole - blocks)))[:, :, None]
    total = quads[:, :8] * norms[:, :8]
    for first in range(8, whole, 8):
        total = fma(quads[:, first : first + 8], norms[:, first : first + 8], total)
    for axis, distances in ((1, (4, 2, 1)), (2, (2, 1))):
        for distance in distances:
            total = total + np.take(total, np.arange(total.shape[axis]) ^ distance, axis)
    assert (total == total[:, :1, :1]).all(), "butterflies leave the same everywhere"
    return total[:, 0, 0]


def expert(up: PackedMatrix, down: PackedMatrix, x: Floats) -> Floats:
    inner = np.maximum(product(up, x), np.float32(0))
    return product(down, rotated(inner * inner))


def random_matrix(out: int, columns: int, bits: int, rounded: bool, seed: int) -> PackedMatrix:
    """A packed Gaussian matrix, some rows of it zero; `rounded` gives it a codebook of bfloat16 values."""
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    weight[seed % 7 :: 7] = 0
    codebook = converged_codebook(bits).bfloat16().float() if rounded else converged_codebook(bits)
    with native.forced(native.PLAIN):
        return pack_matrix(weight, bits, codebook)


def drawn_experts(
    hidden: int, inner: int, bits: tuple[int, int], rounded: bool = True, count: int = 2
) -> tuple[RecordLayout, list[Tensor]]:
    config = ModelConfig.from_dict(tiny_config(hidden_size=hidden, moe_intermediate_size=inner))
    layout = record_layouts(config, [ExpertBits(*bits)] * config.num_layers)[0]
    records = []
    for seed in range(count):
        record = torch.full((layout.size,), 0xAB, dtype=torch.uint8)
        layout.up.store(random_matrix(inner, hidden, bits[0], rounded, seed), record)
        layout.down.store(random_matrix(hidden, inner, bits[1], rounded, 10 + seed), record)
        records.append(record)
    return layout, records


def row(columns: int, seed: int = 0) -> Tensor:
    """(blocks, 128) as a norm would leave it."""
    generator = torch.Generator().manual_seed(columns + seed)
    return torch.from_numpy(rotated(torch.randn(columns, generator=generator).numpy()))


def check(layout: RecordLayout, records: list[Tensor]) -> None:
    x = row(layout.up.in_features)
    got = torch.full((len(records), layout.down.out_features), torch.nan)
    device_experts(layout, records, x, got)
    for record, ours in zip(records, got, strict=True):
        expected = expert(layout.up.view(record), layout.down.view(record), x.numpy())
        assert np.array_equal(ours.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("bits", PLANE_WIDTHS)
def test_every_width(path: str, bits: int, rounded: bool) -> None:
    """Ragged columns, and outputs that are not a whole number of pieces."""
    check(*drawn_experts(1100, 330, (bits, bits), rounded))


@pytest.mark.parametrize("blocks", range(1, 25))
def test_every_number_of_blocks(path: str, blocks: int) -> None:
    check(*drawn_experts(blocks * BLOCK, 50, (5, 4), count=1))
    check(*drawn_experts(48, blocks * BLOCK - 3, (3, 5), count=1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hidden=st.integers(1, 3072),
    inner=st.integers(1, 200),
    bits=st.tuples(*[st.sampled_from(list(PLANE_WIDTHS))] * 2),
    rounded=st.booleans(),
    count=st.integers(1, 3),
)
def test_any_shape(
    path: str, hidden: int, inner: int, bits: tuple[int, int], rounded: bool, count: int
) -> None:
    check(*drawn_experts(hidden, inner, bits, rounded, count))


def test_close_to_exact(path: str) -> None:
    layout, records = drawn_experts(700, 300, (5, 6), count=1)
    x, got = torch.randn(700, generator=torch.Generator().manual_seed(1)), torch.empty(1, 700)
    device_experts(layout, records, torch.from_numpy(rotated(x.numpy())), got)
    weights = []
    for matrix in (m.view(records[0]) for m in layout.matrices):
        assert matrix.codebook is not None and matrix.norms is not None
        levels = matrix.codebook.double()[matrix.codes().long()].view(matrix.shape[0], -1, BLOCK)
        blocks = levels * matrix.norms.double()[:, :, None] / BLOCK**0.5
        weights.append((blocks @ hadamard_matrix().double()).flatten(1)[:, : matrix.in_features])
    expected = weights[1] @ torch.relu(weights[0] @ x.double()).square()
    assert float((got[0].double() - expected).norm() / expected.norm()) <= 1e-6


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int) -> None:
    layout, records = drawn_experts(1100, 330, (5, 5), count=4)
    native.set_threads(threads)
    try:
        for _ in range(20):
            check(layout, records)
    finally:
        native.set_threads(1)


@pytest.mark.parametrize(
    ("hidden", "inner", "bits", "reason"),
    [
        (24 * BLOCK + 1, 8, (5, 5), "up_proj have more than 24 blocks"),
        (8, 24 * BLOCK + 1, (5, 5), "down_proj have more than 24 blocks"),
        (128, 64, (16, 5), "up_proj is not packed"),
    ],
)
def test_refuses(hidden: int, inner: int, bits: tuple[int, int], reason: str) -> None:
    config = ModelConfig.from_dict(tiny_config(hidden_size=hidden, moe_intermediate_size=inner))
    layout = record_layouts(config, [ExpertBits(*bits)] * config.num_layers)[0]
    x = torch.zeros(padded(hidden))
    with pytest.raises(ValueError, match=reason):
        device_experts(layout, [torch.zeros(layout.size, dtype=torch.uint8)], x, torch.zeros(1, hidden))


def test_the_twin_rounds_once() -> None:
    """(1 + 2^-12)^2 is halfway between two floats: what is added decides, though float64 would lose it."""
    a, c = np.full(2, 1 + 2.0**-12, np.float32), np.array([2.0**-60, -(2.0**-60)], np.float32)
    assert fma(a, a, c).tolist() == [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11]
