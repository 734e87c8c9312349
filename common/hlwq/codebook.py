"""Lloyd-Max centroids for N(0, 1): the converged codebook, and the published, unconverged one.

Both come from the same iteration; the published layouts that carry no codebook imply exactly 100 rounds of
it from uniform boundaries over [-4, 4], own packs use the fixed point, rounded to what a bfloat16 holds.
Computed in Python floats with the standard library's `erf`, once per width: no SciPy.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

PUBLISHED_ITERATIONS = 100


def density(z: float) -> float:
    """Standard normal density; 0 at infinity."""
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def probability(low: float, high: float) -> float:
    """P(low < Z <= high), computed in whichever tail keeps its digits."""
    if low > 0:
        return (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
    return (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2


def _centroids(boundaries: list[float]) -> list[float]:
    """Conditional means of N(0, 1) between neighbouring boundaries."""
    centroids = []
    for low, high in pairwise(boundaries):
        mass = probability(low, high)
        centroids.append((density(low) - density(high)) / mass if mass > 1e-10 else (low + high) / 2)
    return centroids


def _boundaries(centroids: list[float]) -> list[float]:
    inner = [(a + b) / 2 for a, b in pairwise(centroids)]
    return [-math.inf, *inner, math.inf]


@cache
def published_codebook(bits: int) -> Tensor:
    """The codebook implied by published layouts: float32 (2**bits,), ascending."""
    levels = 1 << bits
    boundaries = [-4 + 8 * k / levels for k in range(levels + 1)]
    boundaries[0], boundaries[-1] = -math.inf, math.inf
    for _ in range(PUBLISHED_ITERATIONS):
        centroids = _centroids(boundaries)
        boundaries = _boundaries(centroids)
    return torch.tensor(centroids, dtype=torch.float32)


@cache
def converged_codebook(bits: int) -> Tensor:
    """The Lloyd-Max fixed point: float32 (2**bits,), ascending and antisymmetric.

    Plain Lloyd iteration converges linearly with a rate near 1 at 8 bits, so the fixed point is found by
    Newton's method on the half line: the residual of centroid k depends on centroids k-1, k and k+1 only.
    """
    half = 1 << (bits - 1)
    # Panter and Dite's asymptotic density of levels, phi^(1/3), is a normal of sigma sqrt(3): a close start.
    start = torch.special.ndtri(
        (torch.arange(half, dtype=torch.float64) + 0.5) / (2 * half) + 0.5
    ) * math.sqrt(3)
    centroids = start
    for _ in range(60):
        residual, jacobian = _half_residual(centroids)
        step = torch.linalg.solve(jacobian, residual)
        centroids = centroids - step
        if float(step.abs().max()) < 1e-13:
            break
    assert bool((centroids.diff() > 0).all()), "Newton left the ascending order"
    return torch.cat([-centroids.flip(0), centroids]).float()


@cache
def packing_codebook(bits: int) -> Tensor:
    """What own packs use: the converged codebook in bfloat16 values, as float32 (2**bits,), ascending.

    Kernels that look centroids up as 16-bit values are exact on it. The rounding costs nothing that can be
    measured below 8 bits, and 1.7 % of the error there.
    """
    codebook = converged_codebook(bits).bfloat16().float()
    assert bool((codebook.diff() > 0).all()), "two centroids have rounded to one"
    return codebook


def _half_residual(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """centroid - conditional mean of its cell, over the positive half line, and the Jacobian (float64).

    A cell's mean moves with its boundaries by density times distance over mass, and a boundary moves by half
    of what each of its two centroids does; the one at 0 does not move.
    """
    zero = centroids.new_zeros(1)
    inner = (centroids[:-1] + centroids[1:]) / 2
    low = torch.cat([zero, inner])
    phi_low = torch.exp(-low * low / 2) / math.sqrt(2 * math.pi)
    phi_high = torch.cat([phi_low[1:], zero])
    tail_low = torch.special.erfc(low / math.sqrt(2)) / 2
    tail_high = torch.cat([tail_low[1:], zero])
    mass = tail_low - tail_high
    means = (phi_low - phi_high) / mass
    by_low = torch.cat([zero, phi_low[1:] * (means[1:] - inner) / mass[1:] / 2])
    by_high = torch.cat([phi_high[:-1] * (inner - means[:-1]) / mass[:-1] / 2, zero])
    jacobian = torch.diag(1 - by_low - by_high)
    return centroids - means, jacobian - torch.diag(by_low[1:], -1) - torch.diag(by_high[:-1], 1)
