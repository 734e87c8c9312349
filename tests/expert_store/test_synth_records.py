"""Matrices drawn in packed form look like packed Gaussian matrices."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from common.hlwq.codebook import packing_codebook
from common.hlwq.planes import PLANE_WIDTHS, RAW_BITS
from expert_store.synth.records import BlockPool, gaussian_blocks, generator

DEVIATION = 0.02
ROWS, COLUMNS = 1024, 1000  # the last block of a row is not used up


blocks = cache(gaussian_blocks)


@cache
def pool(bits: int) -> BlockPool:
    return BlockPool(blocks(0), bits)


@pytest.mark.parametrize("bits", [*PLANE_WIDTHS, RAW_BITS])
def test_entries_are_gaussian_of_the_deviation_that_was_asked_for(bits: int) -> None:
    matrix = pool(bits).matrix(ROWS, COLUMNS, DEVIATION, generator(0, "matrix"))
    assert matrix.shape == (ROWS, COLUMNS)
    weights = matrix.decode().double() / DEVIATION
    # Lloyd-Max codes lose what is their distortion: at 2 bits 11.75 % of the variance, at 5 bits 0.25 %.
    kept = 1 if bits == RAW_BITS else float(cell_mean(bits, lambda c: c * c))
    assert float(weights.square().mean()) == pytest.approx(kept, rel=0.01)
    assert abs(float(weights.mean())) < 0.005
    # A block of few levels is a sum of 128 terms as well, so decoded it is close to normal at any width.
    assert float(weights.pow(4).mean() / weights.square().mean() ** 2) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("bits", PLANE_WIDTHS)
def test_codes_have_the_probabilities_of_their_cells(bits: int) -> None:
    codes = pool(bits).matrix(4096, 1024, DEVIATION, generator(0, "matrix")).codes()
    found = codes.flatten().int().bincount(minlength=1 << bits).double() / codes.numel()
    expected = cell_probabilities(bits)
    assert float((found - expected).abs().sum()) < 0.01
    on_sphere = sphere_probabilities(bits)
    noise = (on_sphere * codes.numel()).sqrt()
    assert bool(((found - on_sphere).abs() * codes.numel() < 6 * noise + 6).all())


def test_norms_spread_like_those_of_gaussian_blocks() -> None:
    matrix = pool(5).matrix(ROWS, COLUMNS, DEVIATION, generator(0, "matrix"))
    assert matrix.norms is not None
    norms = matrix.norms.double() / DEVIATION
    assert float(norms.square().mean()) == pytest.approx(128, rel=0.01)
    assert float(norms.std()) == pytest.approx(math.sqrt(0.5), rel=0.05)  # of a chi distribution


def test_rows_are_unrelated() -> None:
    weights = pool(5).matrix(256, 2688, 1 / math.sqrt(2688), generator(0, "matrix")).decode()
    gram = weights @ weights.T
    others = gram[~torch.eye(256, dtype=torch.bool)]
    assert float(gram.diagonal().mean()) == pytest.approx(1, rel=0.01)
    assert float(others.std()) == pytest.approx(1 / math.sqrt(2688), rel=0.1)
    assert float(others.abs().max()) < 6 / math.sqrt(2688)


def test_rows_are_those_of_the_whole_matrix() -> None:
    for bits in (5, RAW_BITS):
        matrix = pool(bits).matrix(70, COLUMNS, DEVIATION, generator(0, "matrix"))
        some = [matrix.rows(slice(start, start + 32)) for start in range(0, 70, 32)]
        assert matrix.shape == (70, COLUMNS) and sum(rows.shape[0] for rows in some) == 70
        whole = matrix.to(torch.device("cpu"))
        assert torch.equal(torch.cat([rows.decode() for rows in some]), whole.decode())
        assert torch.equal(matrix.decode(), whole.decode()) and matrix.nbytes == whole.nbytes


def test_names_and_seeds_decide_what_is_drawn() -> None:
    def drawn(seed: int, name: str) -> np.ndarray:
        return generator(seed, name).integers(0, 1 << 30, 8)

    assert (drawn(0, "a") == drawn(0, "a")).all()
    assert (drawn(0, "a") != drawn(0, "b")).any()
    assert (drawn(0, "a") != drawn(1, "a")).any()


def cell_probabilities(bits: int) -> Tensor:
    """Of N(0, 1) in each code's cell, by the error function."""
    codebook = packing_codebook(bits).double()
    inner = ((codebook[1:] + codebook[:-1]) / 2 / math.sqrt(2)).erf() / 2 + 0.5
    edges = torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
    return edges.diff()


def sphere_probabilities(bits: int) -> Tensor:
    """The same for one coordinate of a point on the sphere of radius sqrt(128), which a block lies on."""
    z = torch.linspace(-(128**0.5), 128**0.5, 2_000_001, dtype=torch.float64)
    below = (1 - z * z / 128).clamp(min=0).pow((128 - 3) / 2).cumsum(0)
    codebook = packing_codebook(bits).double()
    inner = below[torch.searchsorted(z, (codebook[1:] + codebook[:-1]) / 2)] / below[-1]
    return torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)]).diff()


def cell_mean(bits: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Expectation of a function of the centroid that stands for z ~ N(0, 1)."""
    return (cell_probabilities(bits) * function(packing_codebook(bits).double())).sum()
