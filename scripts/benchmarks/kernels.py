"""Products from packed records: weights a second, beside what memory delivers, and each path's error."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import machine
import torch
from measure import Comparison, Figure, comparison, rates, seconds
from synthetic import HIDDEN, INTERMEDIATE
from torch import Tensor

from common.errors import ConfigError
from common.hlwq import native
from common.hlwq.codebook import packing_codebook, published_codebook
from common.hlwq.hadamard import hadamard_matrix
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK, PLANE_WIDTHS
from common.hlwq.quantize import pack_matrix

BITS = 5
GIGA_WEIGHTS = INTERMEDIATE * HIDDEN / 1e9  # of one matrix
MATRICES = 48  # 156 MB of packed weights: far beyond any cache
ROUNDS = 7
SEVERAL = (2, 4, 6, 8, 16, 128)  # rows: of an expert in a prompt, and of a dense matrix
SCALING = 0.85  # of linear, from one core to two

Times = dict[int, list[tuple[float, float]]]  # by threads: seconds of (products, reading as many bytes)


def benchmark() -> Iterator[Comparison | Figure]:
    """Products of one row and of several, then the error of each path."""
    matrices = [_random_matrix() for _ in range(MATRICES)]
    yield from _one_row(matrices)
    for rows in SEVERAL:
        x, used = torch.randn(rows, HIDDEN), matrices[: max(1, MATRICES // rows)]
        products = rates(_products(used, x), len(used) * rows * GIGA_WEIGHTS, ROUNDS)
        yield Figure.median(f"product, {rows} rows, {machine.cores()} cores", products, "G multiplications/s")
    yield from _accuracy()


def _one_row(matrices: list[PackedMatrix]) -> Iterator[Comparison | Figure]:
    """For one core, two and all: bytes a second beside reading memory, and weights a second."""
    memory = machine.Memory(sum(matrix.nbytes for matrix in matrices))
    times = _times(_products(matrices, torch.randn(1, HIDDEN)), memory)
    for threads, pairs in times.items():
        ours, theirs = zip(*pairs, strict=True)
        what = f"product, 1 row, {_cores(threads)}: packed weights"
        names = ("product", f"reading memory, {_cores(threads)}")
        yield comparison(what, *names, ours, theirs, memory.size / 1e9, "GB/s", None)
    for threads, pairs in times.items():
        weights = [len(matrices) * GIGA_WEIGHTS / ours for ours, _ in pairs]
        goal = _goal_of_one_core() if threads == 1 else None
        yield Figure.median(f"product, 1 row, {_cores(threads)}", weights, "G weights/s", goal)
    if 2 in times:
        yield _scaling(times)


def _times(products: Callable[[], object], memory: machine.Memory) -> Times:
    """Every number of threads in each round, after a warm-up: a slow moment then hits all of them."""
    times: Times = {threads: [] for threads in sorted({1, 2, machine.cores()}) if threads <= machine.cores()}
    for _ in range(ROUNDS + 1):
        for threads, pairs in times.items():
            machine.use_threads(threads)
            pairs.append((seconds(products), seconds(memory.read)))
    machine.use_threads(machine.cores())
    return {threads: pairs[1:] for threads, pairs in times.items()}


def _goal_of_one_core() -> float | None:
    """G weights/s, where the processor has the instructions that the goal was set for."""
    instructions = machine.instructions()
    if instructions & {"avx512_bf16", "avx512vbmi"}:
        return 16.0
    return 8.0 if {"avx512f", "avx512bw"} <= instructions else None


def _scaling(times: Times) -> Figure:
    """Two cores against twice one; less will do where memory gives no more."""
    shares = [one / two / 2 for (one, _), (two, _) in zip(times[1], times[2], strict=True)]
    limits = [one / memory / 2 for (one, _), (_, memory) in zip(times[1], times[2], strict=True)]
    goal = min(SCALING, statistics.median(limits))
    what = (
        f"product, 1 row: two cores over twice one (goal: {SCALING}, or memory's bandwidth if that is less)"
    )
    return Figure.median(what, shares, "", goal)


def _accuracy() -> Iterator[Figure]:
    """Relative error of one row's product against float64, in every path that this processor can take."""
    x = torch.randn(1, HIDDEN)
    for name, codebook in (("own", packing_codebook), ("published", published_codebook)):
        matrix = pack_matrix(torch.randn(256, HIDDEN), BITS, codebook(BITS))
        expected = _product_in_float64(matrix, x)
        for path in filter(_runs_here, (native.PLAIN, *native.PATHS)):
            with native.forced(path):
                error = float((matrix.product(x) - expected).norm() / expected.norm())
            kind = "PyTorch in float32" if path == native.PLAIN else f"{path} path"
            yield Figure(f"product against float64, {name} codebook: {kind}", error, "relative error")


def _runs_here(path: str) -> bool:
    try:
        with native.forced(path):
            return True
    except ConfigError:
        return False


def _product_in_float64(matrix: PackedMatrix, x: Tensor) -> Tensor:
    """x W'^T by the definition: sum_b n_b / 128 c[code_b] . (S x_b), where S = sqrt(128) H has entries ±1."""
    assert matrix.codebook is not None and matrix.norms is not None
    signs = hadamard_matrix().sign().double()
    rotated = (x.double().view(-1, BLOCK) @ signs).view(x.shape)
    levels = matrix.codebook.double()[matrix.codes().long()].view(*matrix.norms.shape, BLOCK)
    weights = levels * (matrix.norms.double() / BLOCK)[:, :, None]
    return rotated @ weights.view(weights.shape[0], -1).T


def _products(matrices: list[PackedMatrix], x: Tensor) -> Callable[[], object]:
    """x through all of them; calls are prepared once, as a worker does."""
    if native.path() == native.PLAIN:
        return lambda: [matrix.product(x) for matrix in matrices]
    calls = [native.Product(matrix) for matrix in matrices]
    return lambda: [call(x) for call in calls]


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def _random_matrix() -> PackedMatrix:
    blocks = HIDDEN // BLOCK
    planes = tuple(
        torch.randint(256, (INTERMEDIATE, blocks * 16 * width), dtype=torch.uint8)
        for width in PLANE_WIDTHS[BITS]
    )
    norms = torch.rand(INTERMEDIATE, blocks).half() + 0.5
    return PackedMatrix(BITS, HIDDEN, planes, norms, packing_codebook(BITS))
