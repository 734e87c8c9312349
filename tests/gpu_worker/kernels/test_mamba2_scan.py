"""The native scan of Mamba-2 against its twin in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.hlwq import native
from gpu_worker.kernels.mamba2_scan import Mamba2Kernel
from gpu_worker.model.mamba2 import Mamba2
from gpu_worker.model.weights import Mamba2Weights
from tests.helpers.nemotron import make_twins, relative_error

SHAPES: list[dict[str, Any]] = [
    {},
    {"ssm_state_size": 16, "n_groups": 1},
    {"ssm_state_size": 37, "n_groups": 3, "conv_kernel": 2, "use_conv_bias": False},
    {"conv_kernel": 1, "mamba_head_dim": 33, "time_step_min": 0.05},
]


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 1), (1, 40), (2, 7)])
def test_equals_its_twin(shape: dict[str, Any], rows: int, tokens: int) -> None:
    twins = make_twins(**shape)
    weights, config = twins.model.blocks[0][0].mixer, twins.config
    assert isinstance(weights, Mamba2Weights) and native.path() != native.PLAIN
    pools, generator = twins.pools(5), torch.Generator().manual_seed(rows)
    for state in (pools.conv, pools.ssm):
        state.copy_(torch.randn(state.shape, generator=generator))
    conv, ssm = pools.conv[0].clone(), pools.ssm[0].clone()
    places = torch.tensor([3, 0, 4])[:rows]
    kernel, twin = Mamba2Kernel(weights, config), Mamba2(weights, config, 0)
    width = config.mamba_intermediate_size + config.conv_dim + config.mamba_num_heads
    for _ in range(4):  # states go on from step to step
        projected = 3 * torch.randn(rows, tokens, width, generator=generator)
        expected = twin.scan(projected, pools.conv[0], pools.ssm[0], places)
        got = kernel(projected, conv, ssm, places)
        assert relative_error(got, expected) <= 1e-6
    assert torch.equal(conv, pools.conv[0]), "inputs are kept as they are"
    assert relative_error(ssm, pools.ssm[0]) <= 1e-6


def test_prompts_may_be_cut_anywhere() -> None:
    """To the last bit: token by token, a prompt gives what it gives in one piece."""
    twins = make_twins()
    weights, config = twins.model.blocks[0][0].mixer, twins.config
    assert isinstance(weights, Mamba2Weights)
    width = config.mamba_intermediate_size + config.conv_dim + config.mamba_num_heads
    projected, place = torch.randn(1, 30, width), torch.tensor([0])
    kernel, whole, cut = Mamba2Kernel(weights, config), twins.pools(), twins.pools()
    expected = kernel(projected, whole.conv[0], whole.ssm[0], place)
    pieces = [
        kernel(piece, cut.conv[0], cut.ssm[0], place) for piece in projected.split([1, 12, 1, 16], dim=1)
    ]
    assert torch.equal(torch.cat(pieces, 1), expected) and torch.equal(cut.ssm, whole.ssm)


def test_extremes_stay_finite() -> None:
    """Gates and time steps far out: exponentials are clamped, not overflowing."""
    twins = make_twins()
    weights, config = twins.model.blocks[0][0].mixer, twins.config
    assert isinstance(weights, Mamba2Weights)
    pools = twins.pools()
    width = config.mamba_intermediate_size + config.conv_dim + config.mamba_num_heads
    for value in (-300.0, 300.0):
        projected = torch.full((1, 1, width), value)
        kernel = Mamba2Kernel(weights, config)
        assert bool(kernel(projected, pools.conv[0], pools.ssm[0], torch.tensor([0])).isfinite().all())


def test_only_float32_on_the_cpu() -> None:
    wide, narrow = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert Mamba2Kernel.usable(wide, wide, wide)
    assert not Mamba2Kernel.usable(narrow, wide, wide) and not Mamba2Kernel.usable(wide, narrow, wide)
    assert not Mamba2Kernel.usable(wide.to("meta"), wide, wide)
