"""The router's kernels against their plain twin, and what the twin leaves open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.model_config import ModelConfig
from gpu_worker.cuda.kernels.router import prompt_router, router, router_plain, routers, usable
from gpu_worker.model.moe import route
from tests.helpers.models import tiny_config

CONFIG = ModelConfig.from_dict(tiny_config(n_routed_experts=8, num_experts_per_tok=3))
SHAPES = [
    (1, 3, 1, 1),
    (3, 48, 8, 3),
    (6, 130, 7, 7),
    (1, 1030, 5, 2),
    (2, 20, 40, 6),
]  # rows, hidden, experts, k


class Gate:
    """A drawn router of one block, and rows for it."""

    def __init__(self, device: torch.device, hidden: int, experts: int, k: int, **changes: Any) -> None:
        self._generator, self._device = torch.Generator().manual_seed(hidden), device
        self.config = replace(CONFIG, n_routed_experts=experts, num_experts_per_tok=k, **changes)
        self.weight = self.draw(experts, hidden) * 2 / hidden**0.5
        self.bias = self.draw(experts) / 5

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, dtype)

    def route(self, form: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        choices = torch.full((len(x), self.config.num_experts_per_tok), -1, device=self._device)
        weights = torch.full(choices.shape, torch.nan, device=self._device)
        form(x, self.weight, self.bias, self.config, choices, weights)
        return choices, weights

    def check(self, x: Tensor) -> None:
        choices, weights = self.route(router, x)
        expected_choices, expected_weights = self.route(router_plain, x)
        assert torch.equal(choices, expected_choices)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "hidden", "experts", "k"), SHAPES)
def test_equals_its_twin(
    device: torch.device, rows: int, hidden: int, experts: int, k: int, dtype: torch.dtype
) -> None:
    gate = Gate(device, hidden, experts, k)
    gate.check(gate.draw(rows, hidden, dtype=dtype))


def test_several_at_once(device: torch.device) -> None:
    """The same as one after the other, for the same rows."""
    gates = [Gate(device, 48, 8, 3) for _ in range(3)]
    for number, gate in enumerate(gates[1:], 1):
        gate.weight, gate.bias = gate.weight.roll(number, 0), gate.bias.roll(number)
    x = gates[0].draw(2, 48)
    choices = torch.full((3, 2, 3), -1, device=device)
    weights = torch.full((3, 2, 3), torch.nan, device=device)
    stacked = (torch.stack([gate.weight for gate in gates]), torch.stack([gate.bias for gate in gates]))
    routers(x, *stacked, gates[0].config, choices, weights)
    for gate, *of_gate in zip(gates, choices, weights, strict=True):
        assert all(torch.equal(*pair) for pair in zip(of_gate, gate.route(router, x), strict=True))


@pytest.mark.parametrize("normalised", [True, False])
def test_weights_are_normalised_or_not_and_scaled(device: torch.device, normalised: bool) -> None:
    gate = Gate(device, 48, 8, 3, norm_topk_prob=normalised, routed_scaling_factor=1.7)
    gate.check(gate.draw(2, 48))


def test_real_widths(device: torch.device) -> None:
    gate = Gate(device, 2688, 128, 6)
    gate.check(gate.draw(2, 2688, dtype=torch.bfloat16))


@pytest.mark.parametrize(("rows", "hidden", "experts", "k"), SHAPES)
def test_a_prompt_is_routed_like_steps(
    device: torch.device, rows: int, hidden: int, experts: int, k: int
) -> None:
    gate = Gate(device, hidden, experts, k)
    x = gate.draw(rows, hidden, dtype=torch.bfloat16)
    choices, weights = prompt_router(x, gate.weight, gate.bias, gate.config)
    expected_choices, expected_weights = gate.route(router, x)
    assert torch.equal(choices, expected_choices)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=0)


def test_a_prompt_is_routed_by_groups_where_the_model_has_them(device: torch.device) -> None:
    gate = Gate(device, 48, 8, 2, n_group=4, topk_group=2)
    x = gate.draw(5, 48)
    for found, expected in zip(
        prompt_router(x, gate.weight, gate.bias, gate.config),
        route(x, gate.weight, gate.bias, gate.config),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_rows_alone_and_together_are_the_same_bits(device: torch.device) -> None:
    gate = Gate(device, 130, 8, 3)
    x = gate.draw(6, 130, dtype=torch.bfloat16)
    together, again = gate.route(router, x), gate.route(router, x)
    alone = [gate.route(router, row[None].clone()) for row in x]
    for i, whole in enumerate(together):
        assert torch.equal(whole, again[i])
        assert torch.equal(whole, torch.cat([one[i] for one in alone]))


def test_rows_of_a_larger_tensor(device: torch.device) -> None:
    gate = Gate(device, 48, 8, 3)
    gate.check(gate.draw(3, 100)[:, 5:53])


def test_ties_go_to_the_lower_index(device: torch.device) -> None:
    gate = Gate(device, 8, 37, 5)
    gate.weight.zero_()
    gate.bias.zero_()
    gate.bias[[30, 4]] = 0.5  # these two are ahead, and equal to each other
    choices, weights = gate.route(router, gate.draw(2, 8))
    assert choices.tolist() == [[4, 30, 0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full_like(weights, 2.5 / 5))


def test_the_bias_takes_part_in_the_choice_only(device: torch.device) -> None:
    gate = Gate(device, 48, 8, 3, norm_topk_prob=False)
    x = gate.draw(1, 48)
    gate.bias.copy_(torch.tensor([-9.0, 0, 7, 0, 9, 0, 0, 8]))
    choices, weights = gate.route(router, x)
    scores = (x @ gate.weight.T).sigmoid() * gate.config.routed_scaling_factor
    assert choices.tolist() == [[4, 7, 2]]
    torch.testing.assert_close(weights, scores[:, [4, 7, 2]])


@pytest.mark.parametrize("lost", [[1], list(range(8))], ids=["one expert", "all experts"])
def test_scores_that_are_no_numbers_still_give_different_experts(
    device: torch.device, lost: list[int]
) -> None:
    gate = Gate(device, 48, 8, 3)
    gate.weight[lost] = torch.nan
    choices, _ = gate.route(router, gate.draw(2, 48))
    for row in choices.tolist():
        assert (
            len(set(row)) == 3 and set(row) <= set(range(8)) and (len(lost) > 1 or not set(lost) & set(row))
        )


def test_groups_of_experts_are_not_supported() -> None:
    assert usable(CONFIG) and usable(replace(CONFIG, n_group=4, topk_group=4))
    assert not usable(replace(CONFIG, n_group=4, topk_group=2))
