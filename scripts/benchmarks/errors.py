"""How far a Gaussian matrix of the 30B's experts is from itself after packing, at every number of bits.

The weights are bfloat16; what they decode to is float32, so that only the packing is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import published_tool
import torch
from rich import box
from rich.table import Table
from synthetic import HIDDEN, INTERMEDIATE
from torch import Tensor

from common.hlwq.codebook import converged_codebook, packing_codebook, published_codebook
from common.hlwq.planes import BLOCK, PLANE_WIDTHS
from common.hlwq.quantize import pack_matrix

SEED = 0


@dataclass(frozen=True)
class PackingError:
    """One way of packing: ||W' - W|| / ||W|| by the number of bits."""

    what: str
    by_bits: dict[int, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def benchmark() -> Iterator[PackingError]:
    """The published tool; the same with a converged codebook; ours."""
    weight = torch.randn(INTERMEDIATE, HIDDEN, generator=torch.Generator().manual_seed(SEED)).bfloat16()
    ways: dict[str, Callable[[int], Tensor]] = {
        "published tool's algorithm": lambda bits: _published(weight, published_codebook(bits)),
        "converged codebook": lambda bits: _published(weight, converged_codebook(bits)),
        "ours: fitted norms as well": lambda bits: _ours(weight, bits),
    }
    for what, decoded in ways.items():
        yield PackingError(what, {bits: _error(decoded(bits), weight) for bits in PLANE_WIDTHS})


def table(errors: list[PackingError]) -> Table:
    """In Markdown, as the README has it; beside the bits of a code those that are stored, norms included."""
    made = Table(box=box.MARKDOWN, title=f"relative error of a Gaussian {INTERMEDIATE} x {HIDDEN} matrix")
    made.add_column("bits (stored)")
    for bits in PLANE_WIDTHS:
        made.add_column(f"{bits} ({bits + 16 / BLOCK:.3f})")
    for error in errors:
        made.add_row(error.what, *(f"{value:.4f}" for value in error.by_bits.values()))
    return made


def _published(weight: Tensor, codebook: Tensor) -> Tensor:
    codes, norms = published_tool.quantize(weight, codebook)
    return published_tool.dequantize(codes, norms, codebook / math.sqrt(BLOCK)).view(weight.shape)


def _ours(weight: Tensor, bits: int) -> Tensor:
    return pack_matrix(weight, bits, packing_codebook(bits), fit_norms=True).decode()


def _error(decoded: Tensor, weight: Tensor) -> float:
    return float((decoded.double() - weight.double()).norm() / weight.double().norm())
