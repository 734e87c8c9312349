"""Routing against transformers' router, rank order, hints and the sum of routed and shared experts."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.model.mlp import relu2_mlp
from gpu_worker.model.moe import route
from gpu_worker.model.weights import MoEWeights, RouterWeights
from tests.helpers.nemotron import Twins, make_twins, relative_error

ROUTINGS = {
    "one group": {},
    "two of four groups": {"n_group": 4, "topk_group": 2, "n_routed_experts": 16},
    "one of four groups": {"n_group": 4, "topk_group": 1, "n_routed_experts": 16},
    "weights as they are": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_equals_transformers(routing: str) -> None:
    twins = make_twins(**ROUTINGS[routing])
    gate = twins.reference.model.layers[1].mixer.gate
    x = torch.randn(300, 48, generator=torch.Generator().manual_seed(3))
    choices, weights = route(x, gate.weight, gate.e_score_correction_bias, twins.config)
    with torch.inference_mode():
        _, expected_weights, expected_choices = gate(x)
    order, expected_order = choices.argsort(), expected_choices.argsort()
    assert torch.equal(choices.gather(1, order), expected_choices.gather(1, expected_order))
    torch.testing.assert_close(weights.gather(1, order), expected_weights.gather(1, expected_order))


def test_choices_come_best_first_by_score_with_bias() -> None:
    twins = make_twins()
    gate = gates(twins)[0]
    x = torch.randn(300, 48, generator=torch.Generator().manual_seed(3))
    choices, _ = route(x, gate.weight, gate.e_score_correction_bias, twins.config)
    scores = (x @ gate.weight.T).sigmoid() + gate.e_score_correction_bias
    ranked = scores.gather(1, choices)
    assert (ranked[:, :-1] >= ranked[:, 1:]).all()


def test_sixteen_bit_rows_are_routed_in_float32() -> None:
    twins = make_twins()
    gate = gates(twins)[0]
    x = torch.randn(300, 48, generator=torch.Generator().manual_seed(3)).bfloat16()
    choices, weights = route(x, gate.weight, gate.e_score_correction_bias, twins.config)
    wide, wide_weights = route(x.float(), gate.weight, gate.e_score_correction_bias, twins.config)
    assert torch.equal(choices, wide) and torch.equal(weights, wide_weights)


def test_hints_are_the_next_routers_choice_on_this_layers_input() -> None:
    twins = make_twins(hybrid_override_pattern="MEM*EME")
    twins.experts.wants_hints = True
    seen: list[torch.Tensor] = []
    compute = twins.experts.compute

    def watch(layer: int, x: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return compute(layer, x, choices, weights)

    twins.experts.compute = watch  # type: ignore[method-assign]
    twins.model.prefill(twins.tokens(20), 0, twins.pools())
    calls = [(kind, layer) for kind, layer, _ in twins.experts.calls]
    assert calls == [("hint", 1), ("compute", 0), ("hint", 2), ("compute", 1), ("compute", 2)]
    for kind, layer, choices in twins.experts.calls:
        if kind == "hint":
            gate = gates(twins)[layer]
            expected, _ = route(seen[layer - 1], gate.weight, gate.e_score_correction_bias, twins.config)
            assert torch.equal(choices, expected)


def test_no_hints_unless_wanted() -> None:
    twins = make_twins()
    twins.model.prefill(twins.tokens(20), 0, twins.pools())
    assert {kind for kind, _, _ in twins.experts.calls} == {"compute"}


def test_the_shared_expert_is_added_to_the_routed_sum() -> None:
    twins = make_twins()
    (block, moe), mixer = twins.model.blocks[1], twins.reference.model.layers[1].mixer
    assert isinstance(block.mixer, MoEWeights)
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        assert relative_error(moe(x, None), mixer(x)) <= 1e-6  # type: ignore[arg-type]
        shared = block.mixer.shared_experts
        expected = mixer.shared_experts(x)
        assert relative_error(relu2_mlp(x, shared), expected) <= 1e-6


def gates(twins: Twins) -> list[RouterWeights]:
    return [block.mixer.gate for block, _ in twins.model.blocks if isinstance(block.mixer, MoEWeights)]
