"""The native kernels against their twins in PyTorch, on every path that this processor has."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import CheckpointError
from common.hlwq import native
from common.hlwq.codebook import converged_codebook, packing_codebook
from common.hlwq.hadamard import hadamard_matrix, hadamard_transform
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK, PLANE_WIDTHS, empty_planes, pack_planes, padded, unpack_planes
from common.hlwq.quantize import pack_matrix, quantize
from gpu_worker.kernels.expert_mlp import combine
from tests.helpers.native_paths import forced_or_skipped
from tests.helpers.no_room import without_more_room

BITS = (2, 3, 4, 5, 6, 8, 16)
# bfloat16 centroids are looked up exactly; others keep at least 16 bits of their significand.
EXACT, SPLIT = 3e-7, 1.5e-5
several = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
few = settings(several, max_examples=10)


@pytest.fixture(params=native.PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """One path after the other; a processor without AVX-512 or AVX2 has fewer."""
    with forced_or_skipped(request.param) as path:
        yield path


def random_matrix(out: int, columns: int, bits: int, rounded: bool, seed: int = 0) -> PackedMatrix:
    """A packed Gaussian matrix, by the twins; `rounded` gives it a codebook of bfloat16 values."""
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    codebook = None if bits == 16 else converged_codebook(bits)
    if rounded and codebook is not None:
        codebook = codebook.bfloat16().float()
    with native.forced(native.PLAIN):
        return pack_matrix(weight, bits, codebook)


def decoded(matrix: PackedMatrix) -> Tensor:
    """The weights in float64, by the formula alone."""
    if matrix.bits == 16:
        return matrix.decode().double()
    assert matrix.codebook is not None and matrix.norms is not None
    with native.forced(native.PLAIN):
        levels = matrix.codebook.double()[matrix.codes().long()].view(matrix.shape[0], -1, BLOCK)
    scaled = levels * matrix.norms.double()[:, :, None] / BLOCK**0.5
    weights = (scaled @ hadamard_matrix().double()).flatten(1)
    return weights[:, : matrix.in_features]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


shapes = st.tuples(st.integers(1, 70), st.integers(1, 400), st.sampled_from(BITS), st.booleans())


@several
@given(shape=shapes, rows=st.integers(1, 16))
def test_product(path: str, shape: tuple[int, int, int, bool], rows: int) -> None:
    matrix = random_matrix(*shape)
    x = torch.randn(rows, matrix.in_features, generator=torch.Generator().manual_seed(rows))
    expected = x.double() @ decoded(matrix).T
    limit = EXACT if shape[3] or shape[2] == 16 else SPLIT
    scale = float(x.double().norm() * decoded(matrix).norm()) / matrix.in_features**0.5
    got = matrix.product(x)
    assert float((got.double() - expected).norm()) <= limit * max(scale, float(expected.norm()))
    alone = torch.cat([matrix.product(row[None]) for row in x])
    assert torch.equal(alone, got), "a row's result must not depend on its neighbours"


@pytest.mark.parametrize("bits", [5, 8, 16])
@pytest.mark.parametrize("rows", [127, 131, 257])
def test_product_of_many_rows(path: str, bits: int, rows: int) -> None:
    """More rows than are computed at once, in panels that do not come out even."""
    matrix = random_matrix(37, 300, bits, True)
    x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(rows))
    got = matrix.product(x)
    assert relative_error(got, x.double() @ decoded(matrix).T) <= EXACT
    assert torch.equal(got, torch.cat([matrix.product(row[None]) for row in x]))


@pytest.mark.parametrize("columns", [300, 512])
@pytest.mark.parametrize("rows", range(2, 20))
def test_every_number_of_rows(path: str, rows: int, columns: int) -> None:
    """Small numbers have kernels of their own, and so have outputs that do not fill a tile or a vector."""
    for out, rounded in ((16, True), (39, True), (39, False)):
        matrix = random_matrix(out, columns, 5, rounded)
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        got = matrix.product(x)
        assert relative_error(got, x.double() @ decoded(matrix).T) <= (EXACT if rounded else SPLIT)
        assert torch.equal(got, torch.cat([matrix.product(row[None]) for row in x]))


@several
@given(shape=shapes)
def test_decode(path: str, shape: tuple[int, int, int, bool]) -> None:
    matrix = random_matrix(*shape)
    expected = decoded(matrix)
    assert relative_error(matrix.decode(), expected) <= (EXACT if shape[3] else SPLIT)
    assert torch.equal(matrix.decode(torch.bfloat16), matrix.decode().bfloat16())


@several
@given(
    rows=st.integers(1, 9), blocks=st.integers(1, 4), bits=st.sampled_from(list(PLANE_WIDTHS)), data=st.data()
)
def test_planes(path: str, rows: int, blocks: int, bits: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    codes = torch.randint(1 << bits, (rows, blocks * BLOCK), dtype=torch.uint8, generator=generator)
    packed = pack_planes(codes, bits)
    assert torch.equal(unpack_planes(packed, bits), codes)
    with native.forced(native.PLAIN):
        target = empty_planes(rows, blocks * BLOCK, bits)
        assert pack_planes(codes, bits, out=target) is target
    for ours, plain in zip(packed, target, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", PLANE_WIDTHS)
def test_quantize(path: str, bits: int, dtype: torch.dtype) -> None:
    """Sums are taken in another order, so a value may change sides at a midpoint, and with fitted norms a
    block may take another of two shares that fit equally well: rarely, and to no one's harm."""
    weight = (torch.randn(40, 300, generator=torch.Generator().manual_seed(bits)) * 0.02).to(dtype)
    weight[3] = 0
    codebook = packing_codebook(bits)
    for fit_norms in (False, True):
        ours = pack_matrix(weight, bits, codebook, fit_norms)
        with native.forced(native.PLAIN):
            plain = pack_matrix(weight, bits, codebook, fit_norms)
        expected, got = (relative_error(matrix.decode(), weight.double()) for matrix in (plain, ours))
        assert got == pytest.approx(expected, rel=2e-3)
        assert not bool(ours.decode()[3].any()), "zeros stay zeros"
        if not fit_norms:
            assert float((ours.codes() != plain.codes()).float().mean()) <= 1e-3
            assert torch.equal(ours.norms, plain.norms)


@few
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 400),
    bits=st.sampled_from(list(PLANE_WIDTHS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    fit_norms=st.booleans(),
)
def test_quantize_any_shape(
    path: str, rows: int, columns: int, bits: int, dtype: torch.dtype, fit_norms: bool
) -> None:
    """As above, but of few codes one may change sides, and of few norms one may round the other way."""
    generator = torch.Generator().manual_seed(rows * columns)
    weight = (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)
    ours = pack_matrix(weight, bits, packing_codebook(bits), fit_norms)
    with native.forced(native.PLAIN):
        plain = pack_matrix(weight, bits, packing_codebook(bits), fit_norms)
    expected, got = (relative_error(matrix.decode(), weight.double()) for matrix in (plain, ours))
    assert got == pytest.approx(expected, rel=1e-2, abs=2**-11)  # half of what a float16 norm resolves
    assert (
        ours.codes().shape == (rows, padded(columns)) and ours.norms is not None and plain.norms is not None
    )
    if not fit_norms:
        assert int((ours.codes() != plain.codes()).sum()) <= 1 + 1e-3 * ours.codes().numel()
        torch.testing.assert_close(ours.norms, plain.norms, rtol=2**-10, atol=0)


@several
@given(rows=st.integers(1, 40), columns=st.integers(1, 400), bits=st.sampled_from(list(PLANE_WIDTHS)))
def test_every_path_finds_the_same_codes(path: str, rows: int, columns: int, bits: int) -> None:
    """However it searches: up to its comparisons with thresholds, all do the same operations in one order."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    codes, norms = quantize(weight, packing_codebook(bits))
    with native.forced("portable"):
        expected_codes, expected_norms = quantize(weight, packing_codebook(bits))
    assert torch.equal(codes, expected_codes) and torch.equal(norms, expected_norms)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_quantize_refuses(path: str, value: float) -> None:
    weight = torch.ones(9, 200)
    weight[7, 150] = value
    with pytest.raises(CheckpointError, match="not finite, or too large"):
        pack_matrix(weight, 5, packing_codebook(5), True)


@few
@given(shape=st.lists(st.integers(1, 5), max_size=2), blocks=st.integers(1, 6))
def test_hadamard(path: str, shape: list[int], blocks: int) -> None:
    x = torch.randn(*shape, blocks * BLOCK, generator=torch.Generator().manual_seed(blocks))
    expected = (x.view(-1, BLOCK).double() @ hadamard_matrix().double()).view(x.shape)
    got = hadamard_transform(x)
    assert got.shape == x.shape and relative_error(got, expected) <= EXACT
    with native.forced(native.PLAIN):
        assert relative_error(hadamard_transform(x), got.double()) <= EXACT


@several
@given(
    bits=st.tuples(st.sampled_from(BITS), st.sampled_from(BITS)),
    hidden=st.integers(1, 300),
    inner=st.integers(1, 150),
    tokens=st.integers(1, 6),
    k=st.integers(1, 4),
)
def test_experts(path: str, bits: tuple[int, int], hidden: int, inner: int, tokens: int, k: int) -> None:
    """A layer's experts at once, pair by pair: the same bits as one product after the other."""
    ups = [random_matrix(inner, hidden, bits[0], True, seed) for seed in range(4)]
    downs = [random_matrix(hidden, inner, bits[1], True, 10 + seed) for seed in range(4)]
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator)
    choices = torch.stack([torch.randperm(4, generator=generator)[:k] for _ in range(tokens)])
    expected = torch.empty(tokens * k, hidden)
    got = torch.full((tokens * k, hidden), torch.nan)
    for expert in range(4):
        pairs = (choices.flatten() == expert).nonzero().flatten()
        if not len(pairs):
            continue
        up, base = native.layout_of(ups[expert])
        down, _ = native.layout_of(downs[expert], base)
        native.experts(up, down, [base], np.array([0, len(pairs)]), pairs.numpy(), k, x, got)
        middle = torch.relu(ups[expert].product(x[pairs // k])).square()
        expected[pairs] = downs[expert].product(middle)
    assert torch.equal(got, expected)


def test_what_is_no_number_stays_none_between_the_matrices(path: str) -> None:
    up, down = (pack_matrix(torch.randn(8, 8), 5, packing_codebook(5)) for _ in range(2))
    x = torch.randn(2, 8)
    x[0, 3] = torch.nan
    assert native.FeedForward(up, down)(x).isnan().all(1).tolist() == [True, False]


@few
@given(rows=st.integers(1, 40), k=st.integers(1, 8), hidden=st.integers(1, 300))
def test_combine(path: str, rows: int, k: int, hidden: int) -> None:
    """Sums in rank order, of which the twin has the same bits."""
    generator = torch.Generator().manual_seed(hidden)
    products = torch.randn(rows * k, hidden, generator=generator)
    weights = torch.rand(rows, k, generator=generator)
    got = native.combine(products, weights)
    with native.forced(native.PLAIN):
        assert torch.equal(got, combine(products, weights, torch.float32))
    exact = (products.double().view(rows, k, hidden) * weights.double()[:, :, None]).sum(1)
    assert relative_error(got, exact) <= EXACT


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the kernels' threads; one again afterwards, as the tests run."""
    yield native.set_threads
    native.set_threads(1)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_change_nothing(threads: Callable[[int], None], count: int) -> None:
    matrix, x = random_matrix(200, 300, 5, True), torch.randn(3, 300)
    expected = matrix.product(x)
    threads(count)
    for _ in range(50):
        assert torch.equal(matrix.product(x), expected)


def test_callers_take_turns(threads: Callable[[int], None]) -> None:
    """Several Python threads at once, while the pool is resized under them."""
    matrix, x = random_matrix(200, 300, 5, True), torch.randn(3, 300)
    expected = matrix.product(x)

    def work(seed: int) -> bool:
        threads(1 + seed % 3)
        return torch.equal(matrix.product(x), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(200)))


def test_a_fork_can_compute(threads: Callable[[int], None]) -> None:
    """The pool's threads stay behind in the parent: the child must not wait for them."""
    matrix, x = random_matrix(200, 300, 5, True), torch.randn(1, 300)
    threads(2)
    expected = matrix.product(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(matrix.product(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# For a process of its own.
A_PRODUCT = """
import os, threading, torch
from common.hlwq import native
from common.hlwq.quantize import pack_matrix
matrix, x = pack_matrix(torch.randn(200, 300), 5, torch.linspace(-2, 2, 32)), torch.randn(1, 300)
native.set_threads(1)
expected = matrix.product(x)
"""


def test_forks_amid_work_can_compute() -> None:
    """A lock that another thread holds at the fork would never be released in the child."""
    script = f"""{A_PRODUCT}
native.set_threads(2)
def work():
    while True: matrix.product(x)
threading.Thread(target=work, daemon=True).start()
for _ in range(40):
    child = os.fork()
    if child == 0: os._exit(0 if torch.equal(matrix.product(x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_fewer_threads_than_asked_for_will_do() -> None:
    then = "native.set_threads(64)\nprint(torch.equal(matrix.product(x), expected))"
    result = without_more_room(A_PRODUCT, then)
    assert result.stdout == "True\n", result.stderr


def test_too_little_memory_is_told() -> None:
    before = f"""{A_PRODUCT}
narrow, x = pack_matrix(torch.randn(8, 300), 5, torch.linspace(-2, 2, 32)), torch.randn(100_000, 300)
"""
    then = """
try: narrow.product(x)
except Exception as error: print(type(error).__name__, error)
print(torch.equal(matrix.product(x[:1]), matrix.product(x[:1])))
"""
    result = without_more_room(before, then)
    assert result.stdout == "Exhausted there is not enough memory to compute with\nTrue\n", result.stderr


def test_one_thread_is_for_a_block(threads: Callable[[int], None]) -> None:
    threads(2)
    before = torch.get_num_threads()
    with native.one_thread() as had:
        assert (had, torch.get_num_threads(), native.function("hlwq_threads")()) == (before, 1, 1)
    assert (torch.get_num_threads(), native.function("hlwq_threads")()) == (before, 2)


@pytest.mark.parametrize("bits", [5, 16])
def test_nothing_comes_of_no_rows(path: str, bits: int) -> None:
    matrix = random_matrix(64, 256, bits, True)
    assert matrix.product(torch.empty(0, 256)).shape == (0, 64)
    assert matrix.product(torch.empty(1, 0, 256)).shape == (1, 0, 64)


def test_an_expert_without_rows_is_passed_over(path: str) -> None:
    up, down = random_matrix(64, 256, 5, True), random_matrix(256, 64, 5, True)
    (up_layout, base), x = native.layout_of(up), torch.randn(4, 256)
    down_layout, _ = native.layout_of(down, base)
    found = []
    for starts in ([0, 4], [0, 4, 4], [0, 0, 4]):
        products, records = torch.full((4, 256), torch.nan), [base] * (len(starts) - 1)
        native.experts(
            up_layout, down_layout, records, np.array(starts), np.arange(4), 1, x, products
        )  # fmt: skip
        found.append(products)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_activations_must_be_as_wide_as_the_matrix(path: str) -> None:
    with pytest.raises(AssertionError):
        random_matrix(64, 256, 5, True).product(torch.randn(2, 128))


@pytest.mark.parametrize(
    ("value", "printed"),
    [("plain", "plain"), ("portable", "portable"), ("sse9", "must be one of plain, avx512, avx2, portable")],
)
def test_the_environment_chooses(value: str, printed: str) -> None:
    script = "from common.hlwq import native\ntry: print(native.path())\nexcept Exception as e: print(e)"
    environment = os.environ | {native.ENVIRONMENT: value}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert printed in result.stdout, result.stderr


def test_an_installation_without_kernels_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pathlib.Path.glob", lambda self, pattern: iter(()))
    native._loaded.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [native.path() for _ in range(3)] == [native.PLAIN] * 3
        assert caplog.text.count("install a C++ compiler") == 1
        assert padded(100) == 128 and torch.equal(
            random_matrix(2, 9, 16, True).product(torch.eye(9)).T,
            decoded(random_matrix(2, 9, 16, True)).float(),
        )
    finally:
        monkeypatch.undo()
        native._loaded.cache_clear()
