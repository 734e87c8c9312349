"""A MoE block's mixer: route, have the routed experts computed, add the shared expert.

Where routed experts live and how they are fetched is behind `RoutedExperts`. The router decides in float32
and hands its choices over best first: that rank order is the one in which results are summed, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.model_config import ModelConfig
from gpu_worker.kernels import small_steps
from gpu_worker.model.mlp import MLP
from gpu_worker.model.states import Step
from gpu_worker.model.weights import MoEWeights, RouterWeights


class RoutedExperts(Protocol):
    """All routed experts of the model, wherever they are."""

    @property
    def wants_hints(self) -> bool:
        """Whether `hint` should be called now."""

    def expect(self, layer: int, choices: Tensor) -> None:
        """`compute` comes next with these: whatever can be done until then, may be."""

    def compute(self, layer: int, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """Sum over ranks, in rank order, of weights[:, rank] * expert choices[:, rank] of x; in x.dtype.

        x (rows, hidden), choices (rows, k) int64 in [0, experts), weights (rows, k) float32.
        """

    def hint(self, layer: int, choices: Tensor) -> None:
        """`choices` (rows, k) of `layer` will probably be needed soon; nothing is promised."""


def route(
    x: Tensor, weight: Tensor, e_score_correction_bias: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """x (rows, hidden) to choices (rows, k) int64, best first, and their weights (rows, k) float32.

    The bias takes part in the choice only. With n_group > 1, choices come from the topk_group groups whose
    two best experts score highest in sum (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    """
    x, grouped = x.float(), config.n_group > config.topk_group
    if not grouped and small_steps.usable(x, weight, e_score_correction_bias):
        return small_steps.route(x, weight, e_score_correction_bias, config)
    scores = F.linear(x, weight).sigmoid()
    for_choice = scores + e_score_correction_bias
    if grouped:
        by_group = torch.unflatten(for_choice, 1, (config.n_group, -1))
        best = by_group.topk(2).values.sum(-1).topk(config.topk_group).indices
        open_groups = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter_(1, best, True)
        for_choice = by_group.masked_fill(~open_groups[..., None], -torch.inf).flatten(1)
    choices = for_choice.topk(config.num_experts_per_tok, sorted=True).indices
    weights = scores.gather(1, choices)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return choices, weights * config.routed_scaling_factor


class MoE:
    """The mixer of MoE block `layer`; `next_gate` is the router of layer + 1, if there is one."""

    def __init__(
        self,
        weights: MoEWeights,
        next_gate: RouterWeights | None,
        config: ModelConfig,
        layer: int,
        experts: RoutedExperts,
        router: Callable[..., tuple[Tensor, Tensor]] = route,
    ) -> None:
        """`router`: what decides, with the signature of `route`."""
        self.weights, self.next_gate, self._router = weights, next_gate, router
        self.config, self.layer, self.experts = config, layer, experts
        self._shared = MLP(weights.shared_experts)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x (rows, hidden) to (rows, hidden). Rows are independent, so all steps are the same to it."""
        choices, weights = self._route(x, self.weights.gate)
        if self.next_gate is not None and self.experts.wants_hints:
            # The residual stream changes little from block to block, so the next router mostly chooses from
            # this layer's input what it will choose from its own. Before compute: staging overlaps with it.
            self.experts.hint(self.layer + 1, self._route(x, self.next_gate)[0])
        self.experts.expect(self.layer, choices)
        shared = self._shared(x)
        return self.experts.compute(self.layer, x, choices, weights) + shared

    def _route(self, x: Tensor, gate: RouterWeights) -> tuple[Tensor, Tensor]:
        return self._router(x, gate.weight, gate.e_score_correction_bias, self.config)
