"""Properties of the packed form over shapes and bits: inverses, orthogonality, ties, the product."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import CheckpointError, ConfigError
from common.hlwq.codebook import converged_codebook
from common.hlwq.hadamard import hadamard_matrix, hadamard_transform
from common.hlwq.planes import PLANE_WIDTHS, check_bits, pack_planes, unpack_planes
from common.hlwq.quantize import NearestCentroid, pack_matrix

BITS = st.sampled_from(sorted(PLANE_WIDTHS))


@given(bits=BITS, rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 99))
def test_planes_are_inverses(bits: int, rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, blocks * 128), dtype=torch.uint8, generator=generator)
    planes = pack_planes(codes, bits)
    assert sum(plane.numel() for plane in planes) * 8 == codes.numel() * bits
    assert torch.equal(unpack_planes(planes, bits), codes)


def test_plane_order_is_the_documented_one() -> None:
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, 16 * 3 + 5] = 0b10110
    low, high = pack_planes(codes, 5)
    assert low[0].nonzero().item() == 16 * 3 + 5 and low[0, 53] == 0b0110
    assert high[0].nonzero().item() == 5 and high[0, 5] == 1 << 3


def test_transform_equals_butterflies_and_is_its_own_inverse() -> None:
    x = torch.randn(3, 256, dtype=torch.float64)
    blocks, half = x.view(-1, 128), 1
    while half < 128:
        pairs = blocks.view(-1, 128 // (2 * half), 2, half)
        blocks = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).view(
            -1, 128
        )
        half *= 2
    expected = (blocks / math.sqrt(128)).view(3, 256)
    torch.testing.assert_close(hadamard_transform(x.float()).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        hadamard_transform(hadamard_transform(x.float())), x.float(), rtol=0, atol=1e-5
    )
    assert torch.equal(hadamard_matrix(), hadamard_matrix().T)


@given(bits=BITS, seed=st.integers(0, 99))
def test_nearest_centroid_is_the_argmin(bits: int, seed: int) -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(seed)) * 2
    codebook = converged_codebook(bits)
    distances = (values[:, None].double() - codebook.double()).abs().sort(dim=1)
    clear = distances.values[:, 1] - distances.values[:, 0] > 4e-6  # what is no tie
    assert torch.equal(NearestCentroid(codebook)(values)[clear].long(), distances.indices[clear, 0])


def test_ties_take_the_lower_code() -> None:
    codebook = converged_codebook(4)
    midpoints = (codebook[:-1] + codebook[1:]) / 2
    assert NearestCentroid(codebook)(midpoints).tolist() == list(range(15))


@given(bits=st.sampled_from([*PLANE_WIDTHS, 16]), rows=st.integers(1, 40), columns=st.integers(1, 300))
def test_product_equals_the_decoded_product(bits: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    codebook = None if bits == 16 else converged_codebook(bits)
    packed = pack_matrix(torch.randn(rows, columns, generator=generator), bits, codebook)
    x = torch.randn(3, columns, generator=generator)
    expected = x.double() @ packed.decode().double().T
    assert float((packed.product(x) - expected).norm()) <= 1e-5 * float(x.norm()) * math.sqrt(rows)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize("bits", [5, 16])
def test_weights_that_cannot_be_packed_are_refused(value: float, bits: int) -> None:
    weights = torch.randn(4, 256)
    weights[2, 77] = value
    if bits == 16 and value == 1e6:
        return  # bfloat16 holds it
    with pytest.raises(CheckpointError, match="finite"):
        pack_matrix(weights, bits, converged_codebook(5))


def test_unsupported_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="unsupported number of bits 7"):
        check_bits(7)
