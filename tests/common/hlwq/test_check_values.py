"""The published check values of HLWQ, taken from the public reference implementation on a small input."""

import torch

from common.hlwq.codebook import converged_codebook, published_codebook
from common.hlwq.hadamard import hadamard_matrix
from common.hlwq.quantize import NearestCentroid, pack_matrix, quantize

CODES_ROW_0 = (
    """19 16 13 16 15 15 14 16 13 8 2 17 0 16 17 18 16 15 17 19 16 15 16 15 23 15 17 14 15 14 13 15"""
)
CODES_ROW_0_BLOCK_1 = "15 15 18 18 13 16 16 15 0 17 20 15 23 20 24 15"
CODES_ROW_1_END = "16 22 22 15 9 15 15 9 22 15 15 22 15 31 9 16"
PUBLISHED_5 = """-3.551609 -3.016919 -2.662873 -2.382909 -2.141992 -1.924106 -1.720652 -1.526562 -1.338679
-1.154961 -0.974056 -0.795051 -0.617322 -0.440432 -0.264068 -0.087992"""
CONVERGED_5 = """-3.260732 -2.691120 -2.317739 -2.028728 -1.787233 -1.576228 -1.386340 -1.211804 -1.048783
-0.894565 -0.747136 -0.604934 -0.466700 -0.331378 -0.198052 -0.065890"""
PUBLISHED = {
    2: "-1.510418 -0.452780",
    3: "-2.151947 -1.343911 -0.756006 -0.245095",
    4: "-2.754355 -2.093563 -1.643041 -1.279740 -0.962641 -0.672392 -0.397897 -0.131758",
    5: PUBLISHED_5,
}


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def check_weights() -> torch.Tensor:
    """W (2, 160) of the check values."""
    i = torch.arange(160, dtype=torch.float64)
    wave = 0.03 * torch.sin(0.37 * i) + 0.01 * torch.cos(1.7 * i)
    ramp = ((7919 * torch.arange(160) % 101) - 50).double() / 1000
    return torch.stack([wave, ramp]).float()


def is_tie(row: int, column: int) -> bool:
    """Whether the rotated weight is exactly 0, the midpoint between the two middle codes."""
    start = column // 128 * 128
    signs = (hadamard_matrix()[column % 128] > 0).double() * 2 - 1
    return abs(float(check_weights()[row, start : start + 128].double() @ signs[: 160 - start])) < 1e-8


def test_codes_and_norms() -> None:
    codes, norms = quantize(check_weights(), published_codebook(5))
    assert codes.shape == (2, 256)
    assert codes[0, :32].tolist() == numbers(CODES_ROW_0)
    assert codes[0, 128:144].tolist() == numbers(CODES_ROW_0_BLOCK_1)
    # The last value's rotated coordinate is exactly 0, a tie, which the reference left to rounding noise
    # (16); the convention here is the lower code.
    assert numbers(CODES_ROW_1_END)[-1] == 16 and codes[1, -1] == 15 and is_tie(row=1, column=255)
    assert codes[1, -16:-1].tolist() == numbers(CODES_ROW_1_END)[:-1]
    assert norms.view(torch.int16).tolist() == [[13322, 12326], [13639, 12616]]


def test_four_bit_plane_is_the_published_nibbles() -> None:
    packed = pack_matrix(check_weights(), 4, published_codebook(4))
    assert packed.planes[0][0, :8].tolist() == [138, 136, 150, 168, 151, 119, 135, 120]


def test_decoded_weights() -> None:
    packed = pack_matrix(check_weights(), 5, published_codebook(5))
    decoded = packed.decode(torch.bfloat16)
    expected = "0.0098876953125 0.0103759765625 0.0125732421875 0.0302734375 0.0284423828125 0.01220703125"
    assert decoded[0, :6].tolist() == numbers(expected)


def test_codebooks() -> None:
    for bits, text in PUBLISHED.items():
        half = torch.tensor(numbers(text))
        full = torch.cat([half, -half.flip(0)])
        torch.testing.assert_close(published_codebook(bits), full, rtol=0, atol=6e-7)
    half = torch.tensor(numbers(CONVERGED_5))
    torch.testing.assert_close(converged_codebook(5)[:16], half, rtol=0, atol=6e-7)


def test_relative_error_on_a_gaussian_matches_the_published_table() -> None:
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    table = {2: (0.3428, 0.3428), 3: (0.1859, 0.1859), 4: (0.0975, 0.0975), 5: (0.0541, 0.0501),
             6: (0.0324, 0.0254), 8: (0.0090, 0.0064)}  # fmt: skip
    for bits, (published, converged) in table.items():
        for codebook, expected in (
            (published_codebook(bits), published),
            (converged_codebook(bits), converged),
        ):
            error = codebook[NearestCentroid(codebook)(values).int()] - values
            # The table has four digits; a million samples leave a sampling error below 0.2 % of the ratio.
            assert abs(float(error.norm() / values.norm()) - expected) < 1e-4 + 2e-3 * expected


def test_packed_weights_are_no_worse_than_the_codebook() -> None:
    """Normalising each block cuts the tails, so packing a Gaussian errs a little less than its codebook."""
    weights = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    for bits, bound in {3: 0.1859, 4: 0.0975, 5: 0.0501}.items():
        decoded = pack_matrix(weights, bits, converged_codebook(bits)).decode()
        assert 0.95 * bound < float((decoded - weights).norm() / weights.norm()) <= 1.002 * bound
