"""One packed matrix: planes, norms and codebook, the way back to weights, and the product without going back.

The tensors may be views into a record, a file or a slot; nothing here copies them. Sixteen bits mean raw
bfloat16: one plane holding the weights themselves, no norms, no codebook.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from common.hlwq import native
from common.hlwq.hadamard import hadamard_transform
from common.hlwq.planes import BLOCK, RAW_BITS, unpack_planes


def raw_matrix(weight: Tensor) -> PackedMatrix:
    """W (out, in) bfloat16 as a matrix of 16 bits, sharing its memory."""
    assert weight.dtype == torch.bfloat16
    return PackedMatrix(RAW_BITS, weight.shape[1], (weight.contiguous().view(torch.uint8),), None, None)


@dataclass(frozen=True)
class PackedMatrix:
    """W (out_features, in_features).

    planes: (out, bytes) uint8 each; norms: (out, blocks) float16; codebook: (2**bits,) float32, ascending.
    """

    bits: int
    in_features: int
    planes: tuple[Tensor, ...]
    norms: Tensor | None
    codebook: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), as of the matrix that was packed."""
        return self.planes[0].shape[0], self.in_features

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.planes, self.norms, self.codebook) if part is not None)

    def rows(self, rows: slice) -> PackedMatrix:
        """Some of its rows, as views."""
        norms = None if self.norms is None else self.norms[rows]
        return replace(self, planes=tuple(plane[rows] for plane in self.planes), norms=norms)

    def to(self, device: torch.device) -> PackedMatrix:
        """The same on `device`; itself if it is there already."""
        norms, codebook = (None if part is None else part.to(device) for part in (self.norms, self.codebook))
        planes = tuple(plane.to(device) for plane in self.planes)
        return replace(self, planes=planes, norms=norms, codebook=codebook)

    def codes(self) -> Tensor:
        """The codes, padding included: uint8 (out_features, padded in_features)."""
        return unpack_planes(self.planes, self.bits)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W' = n (c[code] / sqrt(128)) H, trimmed to in_features, rounded once to `dtype`."""
        if self.bits == RAW_BITS:
            return self.planes[0].view(torch.bfloat16).to(dtype)
        if dtype in (torch.float32, torch.bfloat16) and native.usable(*self.planes):
            return native.decode(self, dtype)
        return hadamard_transform(self._rotated())[:, : self.in_features].to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """x W'^T for x (..., in_features) in x.dtype: the activations are rotated, never the weights.

        H is orthogonal and symmetric, so a row's dot product is sum_b n_b / sqrt(128) c[code_b] . (H x_b).
        Accumulates in float32 whatever x.dtype is.
        """
        if native.usable(x, *self.planes):
            return native.Product(self)(x)
        if self.bits == RAW_BITS:
            return F.linear(x, self.planes[0].view(torch.bfloat16).to(x.dtype))
        rotated = self._rotated()
        aligned = F.pad(x.float(), (0, rotated.shape[1] - self.in_features))
        return F.linear(hadamard_transform(aligned), rotated).to(x.dtype)

    def _rotated(self) -> Tensor:
        """W' H, padding included: n / sqrt(128) c[code], float32 (out_features, padded in_features)."""
        assert self.codebook is not None and self.norms is not None
        levels = self.codebook.index_select(0, self.codes().view(-1).int())
        scale = self.norms.float() * (1 / math.sqrt(BLOCK))
        return levels.view(*scale.shape, BLOCK).mul_(scale[:, :, None]).view(scale.shape[0], -1)
