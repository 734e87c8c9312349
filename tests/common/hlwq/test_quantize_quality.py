"""How well own packs quantize: their codebook and their fitted norms against the published tool's choices."""

import pytest
import torch
from torch import Tensor

from common.hlwq.codebook import converged_codebook, packing_codebook, published_codebook
from common.hlwq.hadamard import hadamard_matrix
from common.hlwq.planes import PLANE_WIDTHS
from common.hlwq.quantize import pack_matrix, quantize

BITS = sorted(PLANE_WIDTHS)
# Relative errors on N(0, 1): the published tool's codebook and norms, and ours.
TABLE = {2: (0.3411, 0.3385), 3: (0.1846, 0.1783), 4: (0.0967, 0.0886), 5: (0.0539, 0.0439),
         6: (0.0323, 0.0223), 8: (0.00896, 0.00571)}  # fmt: skip


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(384, 1024, generator=torch.Generator().manual_seed(0)) * 0.02


def relative_error(weight: Tensor, bits: int, codebook: Tensor, fit_norms: bool) -> float:
    decoded = pack_matrix(weight, bits, codebook, fit_norms).decode()
    return float((decoded - weight).norm() / weight.norm())


@pytest.mark.parametrize("bits", BITS)
def test_error_at_the_same_size(weight: Tensor, bits: int) -> None:
    published = relative_error(weight, bits, published_codebook(bits), fit_norms=False)
    ours = relative_error(weight, bits, packing_codebook(bits), fit_norms=True)
    assert (published, ours) == pytest.approx(TABLE[bits], rel=5e-3)


@pytest.mark.parametrize("bits", BITS)
def test_packing_codebook_is_the_converged_one_in_bfloat16(bits: int) -> None:
    codebook = packing_codebook(bits)
    assert codebook.dtype == torch.float32 and codebook.shape == (1 << bits,)
    assert torch.equal(codebook.bfloat16().float(), codebook) and bool((codebook.diff() > 0).all())
    torch.testing.assert_close(codebook, converged_codebook(bits), rtol=2**-8, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_no_block_is_worse_than_with_the_plain_norm(weight: Tensor, bits: int) -> None:
    weight = weight[:64] * torch.logspace(-1, 1, 1024)
    codebook = packing_codebook(bits)
    squares = [
        (pack_matrix(weight, bits, codebook, fit).decode() - weight).view(-1, 128).square().sum(1).sqrt()
        for fit in (True, False)
    ]
    # The fit is exact; what is stored is its norm in float16, an error of 2**-12 of the block.
    assert bool((squares[0] <= squares[1] + 2**-11 * weight.view(-1, 128).norm(dim=1)).all())


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_norms_are_the_least_squares_fit_to_the_codes(weight: Tensor, bits: int) -> None:
    codebook = packing_codebook(bits)
    codes, norms = quantize(weight[:32], codebook, fit_norms=True)
    rotated = weight[:32].double().view(-1, 128) @ hadamard_matrix().double()
    levels = codebook.double()[codes.long()].view(-1, 128) / 128**0.5
    fitted = torch.linalg.lstsq(levels[:, :, None], rotated[:, :, None]).solution.view(norms.shape)
    torch.testing.assert_close(norms.double(), fitted, rtol=2**-10, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_zero_blocks_stay_zero(bits: int) -> None:
    weight = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    weight[1, 128:256] = 0
    decoded = pack_matrix(weight, bits, packing_codebook(bits), fit_norms=True).decode()
    assert bool((decoded[1, 128:256] == 0).all()) and bool(torch.isfinite(decoded).all())


def test_the_largest_norm_stays_finite() -> None:
    """A fitted norm may exceed ||w||, and float16 ends not far above it."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    weight *= 65504 * (1 - 1e-6) / weight.norm(dim=1, keepdim=True)
    norms = quantize(weight, packing_codebook(2), fit_norms=True)[1]
    assert bool(torch.isfinite(norms).all()) and bool((norms == 65504).any())
