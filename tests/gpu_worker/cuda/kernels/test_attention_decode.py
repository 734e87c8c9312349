"""Split attention of new tokens against its plain twin, pools included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_worker.cuda.kernels import attention_decode as module
from gpu_worker.cuda.kernels.attention_decode import attention_decode, attention_decode_plain
from tests.helpers.nemotron import relative_error

SEQUENCES, CONTEXT = 5, 150
SPLITS = module._SPLITS
# Triton's interpreter cuts bfloat16 off where a GPU rounds: weights and the result come out up to 2^-8 short.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = [(4, 2, 16), (3, 1, 24), (17, 1, 8), (2, 2, 33)]  # heads, kv heads, head dim


class Pools:
    """Drawn keys and values of one block, past every length as well; `attend` leaves them alone."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], context: int = CONTEXT
    ) -> None:
        self.heads, self.kv_heads, self.d = shape
        self._generator, self._device, self._dtype = torch.Generator().manual_seed(1), device, dtype
        self.keys, self.values = (self.draw(SEQUENCES, self.kv_heads, context, self.d) for _ in range(2))

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, self._dtype)

    def token(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return 2 * self.draw(rows, self.heads, self.d), *self._kv(rows)

    def _kv(self, rows: int) -> tuple[Tensor, Tensor]:
        return self.draw(rows, self.kv_heads, self.d), self.draw(rows, self.kv_heads, self.d)

    def attend(
        self, form: Any, token: tuple[Tensor, ...], places: list[int], positions: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.keys.clone(), self.values.clone()
        where = (torch.tensor(numbers, device=self._device) for numbers in (places, positions))
        y = form(*token, keys, values, *where)
        assert y.dtype == token[0].dtype and y.shape == (len(places), self.heads * self.d)
        return y, keys, values

    def check(self, token: tuple[Tensor, ...], places: list[int], positions: list[int]) -> None:
        y, *pools = self.attend(attention_decode, token, places, positions)
        expected, *expected_pools = self.attend(attention_decode_plain, token, places, positions)
        for row in range(len(places)):
            assert relative_error(y[row], expected[row]) <= TOLERANCE[self._dtype]
        for pool, expected_pool in zip(pools, expected_pools, strict=True):
            assert torch.equal(pool, expected_pool)


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of several blocks without thousands of positions."""
    monkeypatch.setattr(module, "_SPLITS", 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_twin(device: torch.device, shape: tuple[int, int, int]) -> None:
    pools = Pools(device, torch.float32, shape)
    pools.check(pools.token(3), [4, 0, 2], [0, CONTEXT - 1, 77])


def test_equals_its_twin_in_sixteen_bits(device: torch.device) -> None:
    pools = Pools(device, torch.bfloat16, SHAPES[0])
    pools.check(pools.token(3), [1, 4, 3], [0, CONTEXT - 1, 77])


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 32), (torch.bfloat16, 64)], ids=str)
def test_lengths_around_the_edges_of_blocks_and_shares(
    device: torch.device, dtype: torch.dtype, block: int
) -> None:
    pools = Pools(device, dtype, (2, 1, 16))
    for position in (1, block - 1, block, block + 1, 2 * block, 2 * block + 1):
        pools.check(pools.token(1), [3], [position])


def test_real_widths(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SPLITS", SPLITS)
    pools = Pools(device, torch.float32, (32, 2, 128), context=300)
    pools.check(pools.token(1), [3], [299])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_alone_and_together_are_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    pools = Pools(device, dtype, (2, 1, 16))
    token, places, positions = pools.token(3), [4, 0, 2], [140, 0, 66]
    together = pools.attend(attention_decode, token, places, positions)
    for again, first in zip(pools.attend(attention_decode, token, places, positions), together, strict=True):
        assert torch.equal(again, first)
    for row, (place, position) in enumerate(zip(places, positions, strict=True)):
        alone = tuple(part[row : row + 1].clone() for part in token)
        y, keys, values = pools.attend(attention_decode, alone, [place], [position])
        assert torch.equal(y[0], together[0][row])
        assert torch.equal(keys[place], together[1][place])
        assert torch.equal(values[place], together[2][place])


def test_the_size_of_the_pools_changes_no_bit(device: torch.device) -> None:
    small, large = (Pools(device, torch.float32, (4, 2, 16), context) for context in (80, 500))
    large.keys[:, :, :80], large.values[:, :, :80] = small.keys, small.values
    token = small.token(2)
    found, expected = (pools.attend(attention_decode, token, [1, 0], [79, 40])[0] for pools in (small, large))
    assert torch.equal(found, expected)


def test_nothing_beyond_the_new_token_is_read(device: torch.device) -> None:
    """A place that had a longer sequence, or had never any: what is there may be anything."""
    pools = Pools(device, torch.float32, (4, 2, 16))
    token = pools.token(2)
    expected, _, _ = pools.attend(attention_decode, token, [3, 1], [0, 70])
    for pool in (pools.keys, pools.values):
        pool[3] = torch.nan
        pool[1, :, 70:] = torch.nan
    y, _, _ = pools.attend(attention_decode, token, [3, 1], [0, 70])
    assert torch.equal(y, expected) and bool(y.isfinite().all())


def test_rows_of_a_larger_tensor(device: torch.device) -> None:
    """Query, key and value may be parts of one projection."""
    pools = Pools(device, torch.float32, (4, 2, 16))
    parts = pools.draw(3, 8 * 16).split([64, 32, 32], dim=1)
    pools.check(tuple(part.unflatten(1, (-1, 16)) for part in parts), [1, 4, 0], [3, 90, 0])


def test_scores_far_apart(device: torch.device) -> None:
    """One position decides alone, in whichever share it is: all other exponentials vanish."""
    pools = Pools(device, torch.float32, (2, 1, 16))
    q, k, v = pools.token(1)
    for position in (0, 69, 100):
        pools.keys[0, 0, position] = 1e3 * q[0, 0]
        pools.check((q, k, v), [0], [100])
    pools.check((q, 1e4 * q[:, :1], v), [0], [100])
