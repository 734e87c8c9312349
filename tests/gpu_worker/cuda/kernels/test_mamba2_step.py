"""The decode step of Mamba-2 against its plain twin, states included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpu_worker.cuda.kernels.mamba2_step import mamba2_step, mamba2_step_plain
from tests.helpers.mamba2 import DrawnBlock
from tests.helpers.nemotron import relative_error

SEQUENCES = 6
# Triton's interpreter cuts bfloat16 off where a GPU rounds: 2^-8 of each of x, B and C, all to one side.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SMALL = {"mamba_num_heads": 2, "mamba_head_dim": 24, "ssm_state_size": 16, "n_groups": 2}
SHAPES: list[dict[str, Any]] = [
    SMALL,
    SMALL | {"mamba_num_heads": 3, "ssm_state_size": 12, "n_groups": 3, "time_step_min": 0.05},
    SMALL | {"mamba_head_dim": 33, "conv_kernel": 1},
    SMALL | {"mamba_head_dim": 8, "n_groups": 1, "conv_kernel": 2, "use_conv_bias": False},
    SMALL | {"conv_kernel": 5},
]
REAL = {
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "time_step_min": 1e-3,
}


class Block(DrawnBlock):
    """With pools of SEQUENCES; `step` leaves them alone and returns y and both states."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: dict[str, Any]) -> None:
        super().__init__(device, dtype, shape, SEQUENCES)

    def projected(self, rows: int) -> Tensor:
        return 3 * self.draw(rows, self.width)

    def step(self, form: Any, projected: Tensor, places: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        conv, ssm = self.conv.clone(), self.ssm.clone()
        y = form(projected, conv, ssm, torch.tensor(places, device=self.device), self.weights, self.config)
        assert y.dtype == projected.dtype
        return y, conv, ssm

    def check(self, projected: Tensor, places: list[int]) -> None:
        y, conv, ssm = self.step(mamba2_step, projected, places)
        expected, expected_conv, expected_ssm = self.step(mamba2_step_plain, projected, places)
        assert relative_error(y, expected) <= TOLERANCE[self.dtype]
        assert relative_error(ssm, expected_ssm) <= TOLERANCE[self.dtype]
        assert torch.equal(conv, expected_conv), "inputs are kept as they are"
        others = [place for place in range(SEQUENCES) if place not in places]
        assert torch.equal(conv[others], self.conv[others]) and torch.equal(ssm[others], self.ssm[others])


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_equals_its_twin(device: torch.device, shape: dict[str, Any]) -> None:
    block = Block(device, torch.float32, shape)
    for places in ([2], [5, 0, 3]):
        block.check(block.projected(len(places)), places)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=range(2))
def test_equals_its_twin_in_sixteen_bits(device: torch.device, shape: dict[str, Any]) -> None:
    block = Block(device, torch.bfloat16, shape)
    block.check(block.projected(3), [4, 1, 2])


def test_real_widths(device: torch.device) -> None:
    block = Block(device, torch.float32, REAL)
    block.check(block.projected(1), [4])


def test_states_go_on_from_step_to_step(device: torch.device) -> None:
    block, twin = (Block(device, torch.float32, SMALL) for _ in range(2))
    for _ in range(5):
        projected = block.projected(1)
        y, block.conv, block.ssm = block.step(mamba2_step, projected, [3])
        expected, twin.conv, twin.ssm = twin.step(mamba2_step_plain, projected, [3])
        assert relative_error(y, expected) <= 1e-5
    assert relative_error(block.ssm, twin.ssm) <= 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_alone_and_together_are_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    block = Block(device, dtype, SMALL)
    projected, places = block.projected(3), [5, 0, 2]
    together = block.step(mamba2_step, projected, places)
    for again, first in zip(block.step(mamba2_step, projected, places), together, strict=True):
        assert torch.equal(again, first)
    for row, place in enumerate(places):
        y, conv, ssm = block.step(mamba2_step, projected[row : row + 1].clone(), [place])
        assert torch.equal(y[0], together[0][row])
        assert torch.equal(conv[place], together[1][place]) and torch.equal(ssm[place], together[2][place])


def test_rows_of_a_larger_tensor(device: torch.device) -> None:
    block = Block(device, torch.float32, SMALL)
    wide = block.projected(3).repeat(1, 2)
    block.check(wide[:, : wide.shape[1] // 2], [1, 0, 2])


def test_small_and_large_time_steps_keep_their_digits(device: torch.device) -> None:
    """softplus where exp(dt) vanishes beside 1, where it is largest beside it, and where it overflows."""
    steps = torch.tensor([-12.0, -6.0, -1.0, 0.0, 1.0, 19.0, 30.0, 300.0])
    block = Block(device, torch.float32, SMALL | {"mamba_num_heads": len(steps), "mamba_head_dim": 4})
    block.ssm.zero_()
    block.weights.dt_bias.zero_()
    block.weights.D.zero_()  # y is then proportional to the time step
    projected = block.projected(1)
    projected[:, -len(steps) :] = steps
    y, expected = (block.step(form, projected, [0])[0] for form in (mamba2_step, mamba2_step_plain))
    for head in range(len(steps)):
        assert relative_error(y[:, 4 * head : 4 * head + 4], expected[:, 4 * head : 4 * head + 4]) <= 1e-6


def test_extremes_stay_finite(device: torch.device) -> None:
    block = Block(device, torch.float32, SMALL)
    for value in (-300.0, 300.0):
        projected = torch.full_like(block.projected(1), value)
        with np.errstate(over="ignore"):  # the interpreter's exp overflows to infinity in silu, as it should
            y, _, ssm = block.step(mamba2_step, projected, [0])
        assert bool(y.isfinite().all() and ssm.isfinite().all())


def test_a_time_step_that_is_no_number_is_not_clamped_to_one(device: torch.device) -> None:
    block = Block(device, torch.float32, SMALL)
    projected = block.projected(1)
    projected[:, -1] = torch.nan
    y, _, _ = block.step(mamba2_step, projected, [0])
    assert y.view(2, -1).isnan().all(1).tolist() == [False, True]
