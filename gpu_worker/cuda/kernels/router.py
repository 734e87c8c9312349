"""The router of a MoE block: scores of all experts, the best k of them, and their weights.

Two kernels. The first is a product with a float32 matrix, one expert and row a program: 128 experts just
fill a GPU of 132 multiprocessors, and a program reads its 11 KB at once. The second ranks a row's experts by
counting, for each, those ahead of it: no loop over ranks, and ties are settled. Not done here: groups of
experts (`usable`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from common.model_config import ModelConfig
from gpu_worker.cuda.kernels.overlap import overlapping, wait_for_inputs
from gpu_worker.model.moe import route

_COLUMNS = 512  # of the hidden size at a time
_OTHERS = 32  # experts that all are compared with at a time


def usable(config: ModelConfig) -> bool:
    """Whether `router` can do it: all experts are open to every row."""
    return config.n_group <= config.topk_group


def router_plain(
    x: Tensor,
    weight: Tensor,
    e_score_correction_bias: Tensor,
    config: ModelConfig,
    choices: Tensor,
    weights: Tensor,
) -> None:
    """x (rows, hidden) to choices (rows, k) int64, best first, and their weights (rows, k) float32.

    weight (experts, hidden) and e_score_correction_bias (experts,) are float32. Ties go to the lower index,
    which PyTorch does not promise and the kernel does.
    """
    chosen, of_chosen = route(x, weight, e_score_correction_bias, config)
    choices.copy_(chosen)
    weights.copy_(of_chosen)


def router(
    x: Tensor,
    weight: Tensor,
    e_score_correction_bias: Tensor,
    config: ModelConfig,
    choices: Tensor,
    weights: Tensor,
) -> None:
    """As `router_plain`, where `usable`; x may have any stride between rows, all else is contiguous.

    Choices are k different experts even where scores are no numbers, so that nothing is read out of bounds.
    """
    routers(x, weight[None], e_score_correction_bias[None], config, choices[None], weights[None])


def routers(
    x: Tensor,
    weight: Tensor,
    e_score_correction_bias: Tensor,
    config: ModelConfig,
    choices: Tensor,
    weights: Tensor,
) -> None:
    """As `router`, several at once: all but x have their number as the first dimension."""
    (rows, hidden), (count, experts, _) = x.shape, weight.shape
    logits = x.new_empty(rows, count * experts, dtype=torch.float32)
    _logits_kernel[(count * experts, rows)](
        x, weight, logits,
        STRIDE=x.stride(0), HIDDEN=hidden, EXPERTS=count * experts,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(hidden)), num_warps=8, **overlapping(),
    )  # fmt: skip
    _choose(logits, e_score_correction_bias, config, choices, weights)


def prompt_router(
    x: Tensor, weight: Tensor, e_score_correction_bias: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """As `gpu_worker.model.moe.route`, for any number of rows: the product is cuBLAS's."""
    if not usable(config):
        return route(x, weight, e_score_correction_bias, config)
    choices = x.new_empty(1, x.shape[0], config.num_experts_per_tok, dtype=torch.int64)
    weights = torch.empty_like(choices, dtype=torch.float32)
    _choose(F.linear(x.float(), weight), e_score_correction_bias[None], config, choices, weights)
    return choices[0], weights[0]


def _choose(logits: Tensor, bias: Tensor, config: ModelConfig, choices: Tensor, weights: Tensor) -> None:
    """logits (rows, routers * experts) and biases (routers, experts), else as `routers`."""
    count, experts = bias.shape
    _choice_kernel[(logits.shape[0], count)](
        logits, bias, choices, weights,
        EXPERTS=experts, WIDTH=triton.next_power_of_2(experts), OTHERS=_OTHERS, TOP_K=choices.shape[2],
        NORMALISED=config.norm_topk_prob, SCALING=config.routed_scaling_factor,
        **overlapping(),
    )  # fmt: skip


@triton.jit
def _logits_kernel(
    x, weight, logits,
    STRIDE: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    expert, row = tl.program_id(0), tl.program_id(1)
    products = tl.zeros([COLUMNS], tl.float32)
    for start in tl.static_range(0, HIDDEN, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < HIDDEN
        gate = tl.load(weight + expert * HIDDEN + column, mask=inside, other=0.0)
        products += tl.load(x + row * STRIDE + column, mask=inside, other=0.0).to(tl.float32) * gate
    tl.store(logits + row * EXPERTS + expert, tl.sum(products, 0))


@triton.jit
def _scored(logits, bias, expert, EXPERTS: tl.constexpr):
    """Scores of a row's experts, and what decides the choice."""
    inside = expert < EXPERTS
    score = tl.sigmoid(tl.load(logits + expert, mask=inside, other=0.0))
    for_choice = score + tl.load(bias + expert, mask=inside, other=0.0)
    # NaN is ahead of nothing and nothing of it: left in, experts would share ranks, and some stay empty.
    return score, tl.where(inside & (for_choice == for_choice), for_choice, float("-inf"))


@triton.jit
def _choice_kernel(
    logits, bias, choices, weights,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr, OTHERS: tl.constexpr, TOP_K: tl.constexpr,
    NORMALISED: tl.constexpr, SCALING: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    row, rows, router = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    logits += (row * tl.num_programs(1) + router) * EXPERTS
    bias += router * EXPERTS
    first = (router * rows + row) * TOP_K
    expert = tl.arange(0, WIDTH)
    score, for_choice = _scored(logits, bias, expert, EXPERTS)
    mine = for_choice[:, None]
    rank = tl.zeros([WIDTH], tl.int32)
    for start in tl.static_range(0, EXPERTS, OTHERS):
        other = start + tl.arange(0, OTHERS)
        _, of_others = _scored(logits, bias, other, EXPERTS)
        theirs, earlier = of_others[None, :], other[None, :] < expert[:, None]
        ahead = (theirs > mine) | ((theirs == mine) & earlier)
        rank += tl.sum(ahead.to(tl.int32), 1)
    chosen = rank < TOP_K
    if NORMALISED:
        score = score / (tl.sum(tl.where(chosen, score, 0.0), 0) + 1e-20)
    tl.store(choices + first + rank, expert.to(tl.int64), mask=chosen)
    tl.store(weights + first + rank, score * SCALING, mask=chosen)
