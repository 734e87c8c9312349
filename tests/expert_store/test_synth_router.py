"""Popularity: what is aimed at, and what the worker's own router makes of it on inputs it never saw."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.checkpoint import PackedCheckpoint
from common.errors import ConfigError
from common.model_config import ModelConfig
from expert_store.synth.dense import CORRECTION_BIAS
from expert_store.synth.records import generator
from expert_store.synth.router import MOST_POPULAR, TOLERANCE, correction_bias, mismatch, popularity
from expert_store.synth.shapes import NEMOTRON_30B, config_json
from gpu_worker.model.moe import route
from tests.helpers.synth import make_synthetic

SKEWS = [0.0, 0.5, 1.0, 1.5, 4.0]
INPUTS, HIDDEN = 16384, 512


def frequencies(gate: Tensor, bias: Tensor, config: ModelConfig, seed: int = 99) -> Tensor:
    """How often each expert is chosen for fresh inputs of unit variance."""
    x = torch.randn(INPUTS, gate.shape[1], generator=torch.Generator().manual_seed(seed))
    choices, _ = route(x, gate.float(), bias, config)
    return choices.flatten().bincount(minlength=len(bias)).double() / INPUTS


@pytest.mark.parametrize("skew", SKEWS)
def test_the_target_follows_the_law(skew: float) -> None:
    target = popularity(128, 6, skew)
    assert float(target.sum()) == pytest.approx(6)
    assert bool((target <= MOST_POPULAR).all() and (target.diff() <= 0).all())
    below = target[target < MOST_POPULAR]
    ranks = torch.arange(129 - len(below), 129).double()
    slope = (below[0] / below[-1]).log() / (ranks[-1] / ranks[0]).log()
    assert float(slope) == pytest.approx(skew, abs=1e-9)


def test_every_expert_of_few_is_always_chosen() -> None:
    for skew in SKEWS:
        assert popularity(4, 4, skew).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("skew", SKEWS)
def test_the_router_of_the_worker_meets_the_target(skew: float) -> None:
    """Of the mismatch that is allowed, about 0.014 is the noise of so many inputs."""
    config = ModelConfig.from_dict(config_json(NEMOTRON_30B))
    rng = generator(3, "router")
    gate = torch.from_numpy(rng.standard_normal((128, HIDDEN)) / HIDDEN**0.5).bfloat16()
    target = popularity(128, 6, skew)[torch.from_numpy(rng.permutation(128))]
    found = frequencies(gate, correction_bias(gate, 6, target, rng), config)
    assert mismatch(found, target) <= TOLERANCE
    if skew:
        assert float(torch.corrcoef(torch.stack([found, target]))[0, 1]) > 0.995
        assert found.sort(descending=True).values[:4].tolist() == pytest.approx(
            target.sort(descending=True).values[:4].tolist(), rel=0.1
        )


def test_every_layer_of_a_checkpoint_meets_it(tmp_path: Path) -> None:
    checkpoint = make_synthetic(tmp_path / "skewed", skew=1.0)
    target = popularity(16, 3, 1.0)
    orders = []
    for block in (1, 4):
        gate, bias = (gate_tensor(checkpoint, block, name) for name in ("gate.weight", CORRECTION_BIAS))
        found, order = frequencies(gate, bias, checkpoint.config).sort(descending=True)
        assert mismatch(found, target) <= TOLERANCE
        orders.append(order[:3].tolist())
    assert orders[0] != orders[1], "the same experts are popular in every layer"


def test_without_a_bias_experts_are_not_chosen_evenly() -> None:
    """What the bias is for: rows of a router differ in length."""
    config = ModelConfig.from_dict(config_json(NEMOTRON_30B))
    gate = torch.randn(128, HIDDEN, generator=torch.Generator().manual_seed(1)) / HIDDEN**0.5
    gate *= 1 + 0.3 * torch.rand(128, 1, generator=torch.Generator().manual_seed(2))
    even = popularity(128, 6, 0.0)
    assert mismatch(frequencies(gate, torch.zeros(128), config), even) > 2 * TOLERANCE
    bias = correction_bias(gate, 6, even, generator(0, "bias"))
    assert mismatch(frequencies(gate, bias, config), even) <= TOLERANCE


def test_says_so_when_no_bias_will_do() -> None:
    """A router without spread scores all experts alike, and ties go to the same ones for every input."""
    with pytest.raises(ConfigError, match="skew"):
        correction_bias(torch.zeros(8, 16), 2, popularity(8, 2, 0.0), generator(0, "bias"))


def gate_tensor(checkpoint: PackedCheckpoint, block: int, name: str) -> Tensor:
    tensor = checkpoint.dense_matrix(f"backbone.layers.{block}.mixer.{name}")
    assert isinstance(tensor, Tensor)
    return tensor
