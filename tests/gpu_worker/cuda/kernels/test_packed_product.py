"""Products with packed dense weights against their plain twin and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.hlwq.codebook import packing_codebook, published_codebook
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import PLANE_WIDTHS
from common.hlwq.quantize import pack_matrix
from gpu_worker.cuda.kernels.packed_product import MAX_ROWS, PackedProduct, product_plain
from gpu_worker.cuda.kernels.rotation import rotate
from tests.helpers.nemotron import relative_error


def packed(outs: int, columns: int, bits: int, device: torch.device, seed: int = 0) -> PackedMatrix:
    weight = torch.randn(outs, columns, generator=torch.Generator().manual_seed(seed))
    return pack_matrix(weight, bits, packing_codebook(bits)).to(device)


@pytest.mark.parametrize("bits", PLANE_WIDTHS)
@pytest.mark.parametrize("rows", [1, 3])
def test_every_width(bits: int, rows: int, device: torch.device) -> None:
    matrix, x = packed(21, 300, bits, device), torch.randn(rows, 300, device=device)
    y = PackedProduct(matrix)(rotate(x), None, torch.float32)
    assert relative_error(y, x.double() @ matrix.decode().double().T) < 1e-6
    assert relative_error(y, product_plain(rotate(x), matrix, None, torch.float32)) < 1e-6


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, MAX_ROWS),
    outs=st.integers(1, 40),
    columns=st.integers(1, 1400),
    seed=st.integers(0, 9),
)
def test_any_shape(rows: int, outs: int, columns: int, seed: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix, x = packed(outs, columns, 5, device, seed), torch.randn(rows, columns, device=device)
    rotated, residual = rotate(x), torch.randn(rows, outs, device=device)
    y = PackedProduct(matrix)(rotated, residual, torch.float32)
    # Beside what such sums usually are: one of few columns may be next to nothing by chance.
    usual = torch.outer(x.norm(dim=1), matrix.decode().float().norm(dim=1)) / columns**0.5
    error = y - product_plain(rotated, matrix, residual, torch.float32)
    assert error.norm() < 2e-6 * (usual.norm() + residual.norm())


def test_a_codebook_of_another_packer(device: torch.device) -> None:
    matrix = pack_matrix(torch.randn(8, 256), 5, published_codebook(5)).to(device)
    rotated = rotate(torch.randn(1, 256, device=device))
    expected = product_plain(rotated, matrix, None, torch.float32)
    assert relative_error(PackedProduct(matrix)(rotated, None, torch.float32), expected) < 1e-6


def test_into_the_residual_itself_and_in_bfloat16(device: torch.device) -> None:
    matrix, hidden = packed(64, 128, 5, device), torch.randn(2, 64, device=device).bfloat16()
    rotated = rotate(torch.randn(2, 128, device=device))
    expected = product_plain(rotated, matrix, hidden, torch.bfloat16)
    y = PackedProduct(matrix)(rotated, hidden, torch.bfloat16, out=hidden)
    assert y is hidden and relative_error(y, expected) < 1e-2


@pytest.mark.parametrize("rows", [1, 5])
def test_a_row_does_not_depend_on_what_lies_beyond(rows: int, device: torch.device) -> None:
    """Not on stale memory after the last row, nor on the other rows of a batch."""
    matrix, x = packed(9, 384, 5, device), torch.randn(rows, 384, device=device)
    product, rotated = PackedProduct(matrix), rotate(x)
    y = product(rotated, None, torch.float32)
    spoilt = torch.cat([rotated[:1], torch.full_like(rotated, torch.nan)])[:rows]
    assert torch.equal(product(spoilt, None, torch.float32)[0], y[0])
