"""Random matrices drawn in packed form, at the speed of copying.

Blocks of 128 Gaussian weights are quantized once into a pool; a matrix is put together from blocks of the
pool, each place drawing its own. So every block is a genuine packed Gaussian block: codes have the
probabilities of their Lloyd-Max cells, norms spread as they do, and a matrix has the mean square that was
asked for, less what its bits lose. The pool is large enough that two rows of several blocks are never equal,
and that what a file system would compress in one piece hardly repeats.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from common.hlwq.codebook import packing_codebook
from common.hlwq.matrix import PackedMatrix, raw_matrix
from common.hlwq.planes import BLOCK, RAW_BITS
from common.hlwq.quantize import pack_matrix

_BLOCKS = 1 << 16


def generator(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one tensor: their own for each seed and name, whoever draws before."""
    return np.random.Generator(np.random.SFC64([seed, int.from_bytes(name.encode(), "little")]))


def gaussian_blocks(seed: int) -> Tensor:
    """What a pool is made of: float32 (blocks, 128) from N(0, 1)."""
    return torch.from_numpy(generator(seed, "blocks").standard_normal((_BLOCKS, BLOCK), dtype=np.float32))


class BlockPool:
    """Blocks of `gaussian_blocks`, packed; both methods may be called from several threads at once."""

    def __init__(self, blocks: Tensor, bits: int) -> None:
        self.bits = bits
        self.codebook = None if bits == RAW_BITS else packing_codebook(bits)
        self._blocks = pack_matrix(blocks, bits, self.codebook)  # a row each
        self._norms: dict[float, Tensor] = {}  # by deviation, of which a model has a few

    def matrix(self, rows: int, columns: int, deviation: float, rng: np.random.Generator) -> DrawnMatrix:
        """(rows, columns) whose entries have mean 0 and this standard deviation."""
        blocks = -(-columns // BLOCK)
        drawn = torch.from_numpy(rng.integers(0, _BLOCKS, (rows, blocks), dtype=np.int32))
        return DrawnMatrix(self, drawn, columns, deviation)

    def gather(self, drawn: Tensor, columns: int, deviation: float) -> PackedMatrix:
        """The matrix of the blocks `drawn` (rows, blocks), trimmed to `columns`, times `deviation`."""
        flat = drawn.reshape(-1)
        planes = tuple(plane.index_select(0, flat).view(len(drawn), -1) for plane in self._blocks.planes)
        if self._blocks.norms is None:
            return raw_matrix(planes[0].view(torch.bfloat16)[:, :columns] * deviation)
        if deviation not in self._norms:
            self._norms[deviation] = (self._blocks.norms.view(-1).float() * deviation).half()
        norms = self._norms[deviation].index_select(0, flat).view(drawn.shape)
        return PackedMatrix(self.bits, columns, planes, norms, self.codebook)


class DrawnMatrix(PackedMatrix):
    """A matrix of which only the numbers of its blocks exist; `rows` makes rows, anything else makes all."""

    _pool: BlockPool
    _drawn: Tensor
    _deviation: float

    def __init__(self, pool: BlockPool, drawn: Tensor, in_features: int, deviation: float) -> None:
        # Not by the dataclass, which would want the planes.
        values = {"bits": pool.bits, "in_features": in_features, "codebook": pool.codebook}
        vars(self).update(values, _pool=pool, _drawn=drawn, _deviation=deviation)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._drawn), self.in_features

    @cached_property
    def planes(self) -> tuple[Tensor, ...]:
        return self._whole.planes

    @cached_property
    def norms(self) -> Tensor | None:
        return self._whole.norms

    def rows(self, rows: slice) -> PackedMatrix:
        return self._pool.gather(self._drawn[rows], self.in_features, self._deviation)

    def to(self, device: torch.device) -> PackedMatrix:
        return self._whole.to(device)

    @cached_property
    def _whole(self) -> PackedMatrix:
        return self.rows(slice(None))
