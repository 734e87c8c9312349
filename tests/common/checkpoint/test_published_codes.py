"""The arithmetic of published codes and codebooks, against NumPy's packing of bits and plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.checkpoint.published_codes import bit_run, bits_of, extended, nibbles, repacked, stored_codebook
from common.errors import CheckpointError
from common.hlwq import native
from common.hlwq.codebook import packing_codebook, published_codebook
from common.hlwq.planes import BLOCK, empty_planes, pack_planes

# The path in use, the one that every processor has, and the twins; without a compiler only these.
KERNELS = [*dict.fromkeys([native.path(), "portable", native.PLAIN])]
if native.path() == native.PLAIN:
    KERNELS = [native.PLAIN]


@pytest.mark.parametrize("kernels", KERNELS)
@given(bits=st.integers(1, 8), rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_bit_runs_in_both_orders(kernels: str, bits: int, rows: int, blocks: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, blocks * 128), dtype=np.uint8)
    least = np.unpackbits(codes[:, :, None], axis=2, bitorder="little", count=bits).reshape(rows, -1)
    most = np.unpackbits(codes[:, :, None], axis=2)[:, :, 8 - bits :].reshape(rows, -1)
    with native.forced(kernels):
        packed = torch.from_numpy(np.packbits(least, axis=1, bitorder="little"))
        assert np.array_equal(bit_run(packed, bits, most_significant_first=False).numpy(), codes)
        packed = torch.from_numpy(np.packbits(most, axis=1))
        assert np.array_equal(bit_run(packed, bits, most_significant_first=True).numpy(), codes)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("most_significant_first", [False, True])
@pytest.mark.parametrize(("width", "bits"), [(2, 2), (3, 3), (3, 5), (4, 4), (5, 5), (5, 8), (6, 6), (7, 8)])
def test_runs_go_straight_into_planes(
    width: int, bits: int, most_significant_first: bool, kernels: str
) -> None:
    """Also into wider ones; rows beside them are left as they are."""
    run = torch.randint(0, 256, (6, 3 * 16 * width), dtype=torch.uint8)
    with native.forced(native.PLAIN):
        expected = pack_planes(bit_run(run, width, most_significant_first), bits)
    planes = empty_planes(8, 3 * BLOCK, bits)
    for plane in planes:
        plane.fill_(77)
    with native.forced(kernels):
        repacked(run, width, most_significant_first, bits, tuple(plane[1:7] for plane in planes))
    for plane, right in zip(planes, expected, strict=True):
        assert torch.equal(plane[1:7], right) and (plane[[0, 7]] == 77).all()


def test_nibbles_are_the_halves_of_a_block() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    codes = nibbles(packed).tolist()
    for row in range(2):
        for column in range(256):
            block, place = divmod(column, 128)
            byte = int(packed[row, 64 * block + place % 64])
            assert codes[row][column] == (byte >> 4 if place >= 64 else byte & 15)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("known", [published_codebook, packing_codebook])
def test_known_codebooks_survive_any_way_of_scaling(bits: int, known: object) -> None:
    """In float32 as in float64; times the reciprocal as divided."""
    assert callable(known)
    codebook = known(bits)
    root = 128**0.5
    for scaled in (codebook / root, codebook * (1 / root), (codebook.double() / root).float()):
        assert torch.equal(stored_codebook(scaled, scaled=True), codebook)
    assert torch.equal(stored_codebook(codebook, scaled=False), codebook)
    other = torch.nextafter(codebook * (1 + 1e-6), codebook)
    assert torch.equal(stored_codebook(other, scaled=False), other)


@pytest.mark.parametrize(
    "values", [[-5.0, -4.0, -3.5, -1.0], [1e-30, 2e-30, 3e-30, 4e-30], [-3e38, 0, 1, 3e36]]
)
def test_an_extended_codebook_ascends_from_any_end(values: list[float]) -> None:
    codebook = torch.tensor(values)
    for bits in (3, 4, 5, 6, 8):
        wider = extended(codebook, bits)
        assert wider.shape == (1 << bits,) and torch.equal(wider[:4], codebook)
        assert bool((wider.diff() > 0).all()) and bool(torch.isfinite(wider).all())
    assert torch.equal(extended(codebook, 2), codebook)


def test_bits_by_the_largest_code() -> None:
    def counts(*codes: int) -> torch.Tensor:
        return torch.bincount(torch.tensor(codes), minlength=256)

    for bits in range(1, 9):
        assert bits_of(counts(*range(1 << bits))) == bits
        assert bits_of(counts(0, 1 << (bits - 1))) == bits
    with pytest.raises(CheckpointError, match="largest code of 255 far from all others"):
        bits_of(counts(*[7, 8] * 100, 255))
    with pytest.raises(CheckpointError, match="largest code of 0 "):
        bits_of(counts(0, 0, 0))
