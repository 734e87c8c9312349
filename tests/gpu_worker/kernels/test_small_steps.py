"""The native norm and router against their twins in PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common.hlwq import native
from common.model_config import ModelConfig
from gpu_worker.kernels import small_steps
from gpu_worker.model import moe
from gpu_worker.model.norms import rms_norm
from tests.helpers.models import tiny_config
from tests.helpers.nemotron import relative_error

CONFIG = ModelConfig.from_dict(tiny_config(n_routed_experts=37, num_experts_per_tok=5))


@pytest.mark.parametrize("shape", [(1, 2688), (3, 7), (2, 4, 33)])
def test_norm(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    x, weight = (5 * torch.randn(size, generator=generator) for size in (shape, shape[-1:]))
    with native.forced(native.PLAIN):
        expected = rms_norm(x.double(), weight.double(), 1e-5)
    assert small_steps.usable(x, weight) and relative_error(rms_norm(x, weight, 1e-5), expected) <= 3e-7


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("rows", [1, 9])
def test_route(rows: int, normalise: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, gate = torch.randn(rows, 50, generator=generator), torch.randn(37, 50, generator=generator) / 7
    bias, config = torch.randn(37, generator=generator) / 5, replace(CONFIG, norm_topk_prob=normalise)
    with native.forced(native.PLAIN):
        expected_choices, expected_weights = moe.route(x, gate, bias, config)
    choices, weights = moe.route(x, gate, bias, config)
    assert torch.equal(choices, expected_choices)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-6)
    alone = [moe.route(row[None], gate, bias, config) for row in x]
    assert torch.equal(torch.cat([w for _, w in alone]), weights), "rows do not depend on each other"


def test_equal_experts_are_chosen_in_order() -> None:
    choices, weights = moe.route(torch.zeros(1, 8), torch.ones(37, 8), torch.zeros(37), CONFIG)
    assert choices.tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(weights, torch.full((1, 5), 2.5 / 5))
