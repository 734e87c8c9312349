"""Correction biases that give a layer's experts a stated popularity.

An expert's popularity is the share of tokens that choose it; those of a layer sum to the experts a token
chooses. With skew Z the expert of rank r has a popularity proportional to r^-Z, but at most 0.95. A bias is
found by simulation: the router's scores for random inputs of unit variance, and the rule that chooses from
them, until the frequencies of choices match.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError

MOST_POPULAR = 0.95
TOLERANCE = 0.03  # what a simulation may differ by from the target, as `mismatch` measures it
_SAMPLES = 8192
_ROUNDS = 50


def popularity(experts: int, chosen: int, skew: float) -> Tensor:
    """The target: share of tokens that choose the expert of each rank, float64 (experts,), descending."""
    most = max(MOST_POPULAR, chosen / experts)
    ranks = torch.arange(1, experts + 1, dtype=torch.float64)
    weights = ranks**-skew
    for capped in range(chosen + 1):  # the most popular so many are at the cap, the others share the rest
        scale = (chosen - capped * most) / weights[capped:].sum()
        if scale * weights[capped] <= most * (1 + 1e-9):
            break
    shares = scale * weights
    shares[:capped] = most
    return shares


def mismatch(frequencies: Tensor, target: Tensor) -> float:
    """Total variation distance between two distributions of choices: 0 equal, 1 disjoint."""
    return float((frequencies - target).abs().sum() / (2 * target.sum()))


def correction_bias(gate: Tensor, chosen: int, target: Tensor, rng: np.random.Generator) -> Tensor:
    """The bias, float32 (experts,), with which the router `gate` (experts, hidden) meets `target`.

    Raises ConfigError where no bias was found that meets it within TOLERANCE.
    """
    logits = _logits(gate, rng)
    scores, spread = logits.sigmoid(), gate.float().norm(dim=1)
    bias = -_score_exceeded(target, spread)
    for _ in range(_ROUNDS):
        choices = (scores + bias).topk(chosen).indices
        frequencies = choices.flatten().bincount(minlength=len(bias)).double() / _SAMPLES
        if mismatch(frequencies, target) <= TOLERANCE / 2:
            return (bias - bias.mean()).float()
        frequencies.clamp_(0.5 / _SAMPLES, 1 - 0.5 / _SAMPLES)
        # If the threshold of being chosen stood still, these steps would lead straight to the target.
        bias += _score_exceeded(frequencies, spread) - _score_exceeded(target, spread)
    raise ConfigError("no correction biases give this popularity: choose a smaller --skew")


def _logits(gate: Tensor, rng: np.random.Generator) -> Tensor:
    """The router's logits for random inputs x of unit variance, float32 (samples, experts).

    With gate^T = QR they are (Q^T x)^T R, and Q^T x is as random as x, only shorter.
    """
    factor = torch.linalg.qr(gate.float().T).R
    inputs = rng.standard_normal((_SAMPLES, factor.shape[0]), dtype=np.float32)
    return torch.from_numpy(inputs) @ factor


def _score_exceeded(share: Tensor, spread: Tensor) -> Tensor:
    """The score that an expert with logits of this standard deviation exceeds for this share of inputs."""
    return (spread * torch.special.ndtri(1 - share).float()).sigmoid()
