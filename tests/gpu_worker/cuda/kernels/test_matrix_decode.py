"""Products of any number of rows with a packed matrix, whichever way they are taken."""

import pytest
import torch

from common.hlwq.codebook import packing_codebook
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import PLANE_WIDTHS, padded
from common.hlwq.quantize import pack_matrix
from gpu_worker.cuda.kernels import matrix_decode
from gpu_worker.cuda.kernels.matrix_decode import PackedLinear, decode_plain
from tests.helpers.nemotron import relative_error

# A GPU rounds to bfloat16, the interpreter cuts.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3 if torch.cuda.is_available() else 1.5e-2}


def packed(outs: int, columns: int, bits: int, device: torch.device) -> PackedMatrix:
    return pack_matrix(torch.randn(outs, columns), bits, packing_codebook(bits)).to(device)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 70])
def test_any_number_of_rows(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    matrix, x = packed(150, 200, 5, device), torch.randn(rows, 200, device=device).to(dtype)
    y = PackedLinear(matrix)(x)
    assert y.dtype == dtype and y.shape == (rows, 150)
    assert relative_error(y, x.double() @ matrix.decode().double().T) < TOLERANCE[dtype] or rows == 0


def test_leading_axes(device: torch.device) -> None:
    linear, x = PackedLinear(packed(9, 128, 4, device)), torch.randn(2, 9, 128, device=device)
    assert torch.equal(linear(x), linear(x.view(18, 128)).view(2, 9, 9))


@pytest.mark.parametrize("bits", PLANE_WIDTHS)
def test_decoding_every_width(bits: int, device: torch.device) -> None:
    """Some rows, and nothing beyond them."""
    matrix, rows = packed(100, 200, bits, device), slice(7, 90)
    decoded = torch.full((90, padded(200)), torch.nan, device=device)
    found = PackedLinear(matrix).decode(rows, decoded)
    assert torch.equal(found, decode_plain(matrix, rows, torch.float32))
    assert decoded[83:].isnan().all()


def test_decoded_in_pieces(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = packed(150, 128, 3, device), torch.randn(40, 128, device=device)
    whole = PackedLinear(matrix)(x)
    monkeypatch.setattr(matrix_decode, "MOST_DECODED", 64 * 128 * 4)
    assert relative_error(PackedLinear(matrix)(x), whole) < 1e-6
