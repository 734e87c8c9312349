"""Calibrated codes: rounding that errs less where it matters, on the inputs a matrix really sees.

Plain packing minimises ||W' - W||². Over inputs x the output errs by E ||(W' - W) x||², which is
tr((W' - W) S (W' - W)^T) with S = E x x^T. That is minimised here, in the basis that HLWQ rounds in: there S
becomes H S H, H on every block of 128. Columns are rounded one after the other, and each makes up for the
errors of those before it as far as inputs are correlated (GPTQ, arXiv:2210.17323, in the form of LDLQ,
arXiv:2307.13304). Norms are those of plain packing, and decoders see no difference. Where inputs come from is
not known here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import CheckpointError
from common.hlwq.hadamard import hadamard_transform
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK, pack_planes, padded
from common.hlwq.quantize import NearestCentroid, quantize

# Damping, in shares of the mean of S's diagonal: a part that is always there, and one that grows as inputs
# get few for their dimension. Chosen by output errors on text that was not calibrated on.
_DAMPING, _DAMPING_OF_FEW = 0.3, 0.2
_DAMPING_OF_PADDING = (
    0.01  # padding is cut off after decoding: its errors cost nothing, and rounding may use it
)


@dataclass(frozen=True)
class Moment:
    """What is known of a matrix's inputs: the sum of x x^T, float32 (in, in), and how many there were."""

    total: Tensor
    count: float

    @classmethod
    def of(cls, inputs: Tensor) -> Moment:
        """The moment of inputs (count, in)."""
        inputs = inputs.float()
        return cls(inputs.T @ inputs, inputs.shape[0])

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.total + other.total, self.count + other.count)

    def scaled(self, count: float) -> Moment:
        """The same mean, as if of `count` inputs."""
        return Moment(self.total * (count / self.count), count)


def error_feedback(moment: Moment) -> Tensor | None:
    """R with H S H = R D R^T, unit upper triangular, D diagonal: float32 (padded in, padded in).

    Column j says how much of the errors of the columns before it column j makes up for. None when no input
    was ever seen, or none but zeros. Raises CheckpointError when inputs, or their squares, were not finite.
    """
    columns = moment.total.shape[0]
    mean = float(moment.total.diagonal().mean())
    if not math.isfinite(mean):
        raise CheckpointError("the inputs that were seen in calibration are too large, or not finite")
    if mean <= 0:
        return None
    size = padded(columns)
    damped = torch.zeros(size, size)
    damped[:columns, :columns] = moment.total
    diagonal = damped.diagonal()
    diagonal[:columns] += (_DAMPING + _DAMPING_OF_FEW * columns / moment.count) * mean
    diagonal[columns:] = _DAMPING_OF_PADDING * mean
    rotated = hadamard_transform(hadamard_transform(damped).T.contiguous())
    # An upper factor instead of a lower one: Cholesky of the matrix read backwards.
    factor = torch.linalg.cholesky(rotated.flip(0, 1).double()).float().flip(0, 1)
    return factor / factor.diagonal()


def feedback_memory(columns: int) -> int:
    """Bytes that `error_feedback` takes: two copies in double precision, three in single."""
    return 28 * padded(columns) ** 2


def quantize_calibrated(weight: Tensor, codebook: Tensor, feedback: Tensor) -> tuple[Tensor, Tensor]:
    """W (out, in) float -> codes uint8 (out, padded in), norms float16 (out, blocks), as `quantize` does.

    `feedback` is that of W's inputs. Rows do not depend on each other. Raises what `quantize` raises.
    """
    norms = quantize(weight, codebook, fit_norms=True)[1]
    rounding = _Rounding(codebook)
    # Transposed: the columns that are rounded one by one lie together.
    wanted = hadamard_transform(
        F.pad(weight.float(), (0, feedback.shape[0] - weight.shape[1]))
    ).T.contiguous()
    errors = torch.empty_like(wanted)
    codes = torch.empty(wanted.shape, dtype=torch.uint8)
    for block, norm in enumerate(norms.T.float()):
        start = block * BLOCK
        rows = slice(start, start + BLOCK)
        due = torch.addmm(wanted[rows], feedback[:start, rows].T, errors[:start])
        codes[rows] = rounding(
            wanted[rows], due, norm / math.sqrt(BLOCK), feedback[rows, rows].T.contiguous(), errors[rows]
        )
    return codes.T.contiguous(), norms


def pack_calibrated(weight: Tensor, bits: int, codebook: Tensor, feedback: Tensor) -> PackedMatrix:
    """W (out, in) -> its packed form at `bits`, of `quantize_calibrated`."""
    codes, norms = quantize_calibrated(weight, codebook, feedback)
    return PackedMatrix(bits, weight.shape[1], pack_planes(codes, bits), norms, codebook)


class _Rounding:
    """Rounds the columns of one block in turn; here they are rows."""

    def __init__(self, codebook: Tensor) -> None:
        self._codebook = codebook
        self._nearest = NearestCentroid(codebook)

    def __call__(
        self, wanted: Tensor, due: Tensor, scale: Tensor, feedback: Tensor, errors: Tensor
    ) -> Tensor:
        """Codes (128, out) of `wanted` (128, out), whose errors go to `errors`.

        `due` is `wanted` with what it makes up for of earlier blocks; `feedback` is lower triangular.
        """
        codes = torch.empty(wanted.shape, dtype=torch.uint8)
        inverse = torch.where(scale > 0, 1 / scale, 0)  # a block of zeros stays zero
        for column in range(BLOCK):
            value = torch.addmv(due[column], errors[:column].T, feedback[column, :column])
            codes[column] = self._nearest(value * inverse)
            rounded = self._codebook.index_select(0, codes[column].int()).mul_(scale)
            torch.sub(wanted[column], rounded, out=errors[column])
        return codes
