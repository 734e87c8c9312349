"""State pools: a place is as new after reset, whatever happened to it, and unused memory is not taken."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpu_worker.model.states import StatePools
from tests.helpers.nemotron import Twins, make_twins


@pytest.fixture(scope="module")
def twins() -> Twins:
    return make_twins()


def test_a_reset_place_serves_as_a_fresh_one(twins: Twins) -> None:
    pools, tokens = twins.pools(sequences=2), twins.tokens(30)
    fresh = twins.model.prefill(tokens, 1, pools)
    twins.model.prefill(tokens, 0, pools)
    kept = pools.keys[:, 0].clone()
    pools.reset(1)
    assert pools.lengths.tolist() == [30, 0] and torch.equal(pools.keys[:, 0], kept)
    assert torch.equal(twins.model.prefill(tokens, 1, pools), fresh)


def test_reset_clears_what_a_failed_step_left(twins: Twins) -> None:
    """The failing step has written NaN keys at its positions, which would spoil whoever comes next."""
    pools, tokens = twins.pools(), twins.tokens(40)
    fresh = twins.model.prefill(tokens[:1], 0, pools)
    pools.reset(0)
    compute = twins.experts.compute

    def fail(layer: int, x: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if layer == 1:
            raise RuntimeError("store gone")
        return compute(layer, x * torch.nan, choices, weights)

    twins.experts.compute = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="store gone"):
        twins.model.prefill(tokens, 0, pools)
    twins.experts.compute = compute  # type: ignore[method-assign]
    assert pools.keys.isnan().any()
    pools.reset(0)
    for state in (pools.conv, pools.ssm, pools.keys, pools.values):
        assert not state.any()
    assert torch.equal(twins.model.decode(tokens[:1], torch.tensor([0]), pools).isnan(), fresh.isnan())


def test_unused_context_costs_no_memory(twins: Twins) -> None:
    config = replace(twins.config, num_key_value_heads=8, head_dim=128)
    before = resident_bytes()
    pools = StatePools(config, sequences=4, max_context=1 << 15)
    assert pools.keys.nbytes == 512 << 20
    assert resident_bytes() - before < 64 << 20


def resident_bytes() -> int:
    """Of this process, now: a peak would hide what an earlier test has taken."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_of_a_model_without_attention(dtype: torch.dtype) -> None:
    config = make_twins(hybrid_override_pattern="ME").config
    pools = StatePools(config, sequences=3, max_context=8, dtype=dtype)
    assert pools.keys.shape == (0, 3, 2, 8, 16) and pools.keys.dtype == dtype
    assert pools.conv.shape == (1, 3, config.conv_dim, 3) and pools.ssm.shape == (1, 3, 6, 8, 12)
    pools.reset(2)
