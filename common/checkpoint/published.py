"""A matrix in a published HLWQ layout, read: its codes into planes, its norms and its codebook as they are.

Nothing is decoded and quantized again. The data are checked as they are read, and a refusal names the tensor.
Which layout it is comes from `published_form`, the arithmetic of codes from `published_codes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from common.checkpoint.published_codes import bit_run, bits_of, extended, nibbles, repacked, stored_codebook
from common.checkpoint.published_form import HLWQ, NIBBLES, Q5, Form, checked_bits
from common.checkpoint.values import are_norms
from common.errors import CheckpointError
from common.hlwq.codebook import published_codebook
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK, empty_planes, pack_planes, padded

_CODES_AT_ONCE = 1 << 23  # an expert's matrix at once; of larger ones no more is held one code a byte

# Few enough for PyTorch not to share them among its threads: for milliseconds after such work
# they still spin on cores that the native kernels need.
_NORMS_AT_ONCE = 1 << 14


class PublishedMatrix:
    """One quantized matrix of an open directory."""

    def __init__(self, form: Form) -> None:
        self.form = form

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(place.info.size for place in self.form.places)

    @cached_property
    def bits(self) -> int:
        """Bits of the codes: from the headers, or by reading all codes where nothing else tells."""
        if self.form.bits is not None:
            return self.form.bits
        codes = self.form.codes
        counts = torch.zeros(256, dtype=torch.int64)
        for rows in self._row_slices():
            counts += torch.bincount(self._stored(rows).view(-1), minlength=256)
        try:
            bits = bits_of(counts)
        except CheckpointError as error:
            raise codes.refusal(str(error)) from None
        return checked_bits(codes, bits, "its largest code", self.form.width)

    def read(self, bits: int | None = None) -> PackedMatrix:
        """The matrix in planes of `bits`, its own by default; wider planes hold the same codes.

        Raises CheckpointError naming the tensor whose data cannot be right.
        """
        bits = bits or self.bits
        assert bits >= self.bits, "codes cannot be carried over to fewer bits"
        self._check_meta()
        norms, codebook = self._norms(), self._codebook(bits)
        return PackedMatrix(bits, self.form.shape[1], self._planes(bits), norms, codebook)

    def decode(self) -> Tensor:
        """The matrix in bfloat16."""
        return self.read().decode(torch.bfloat16)

    def _planes(self, bits: int) -> tuple[Tensor, ...]:
        planes, width = empty_planes(self.form.shape[0], padded(self.form.shape[1]), bits), self.form.width
        for some in self._row_slices():
            stored, target = self._stored(some), tuple(plane[some] for plane in planes)
            if self.form.layout in (Q5, HLWQ) and self.bits == width:  # then no code is out of range
                repacked(stored, width, self.form.layout == HLWQ, bits, target)
                continue
            codes = self._unpack(stored)
            if self.bits < width and int(codes.max()) >= 1 << self.bits:
                raise self.form.codes.refusal(
                    f"holds code {int(codes.max())}, out of range for codes of {self.bits} bits"
                )
            pack_planes(codes, bits, out=target)
        return planes

    def _stored(self, rows: slice) -> Tensor:
        """The bytes of some rows' codes: uint8 (rows, bytes)."""
        row_bytes = padded(self.form.shape[1]) * self.form.width // 8
        if self.form.layout == HLWQ:
            stored = self.form.codes.tensor(slice(rows.start * row_bytes, rows.stop * row_bytes))
        else:
            stored = self.form.codes.tensor(rows).view(torch.uint8)
        return stored.view(-1, row_bytes)

    def _unpack(self, stored: Tensor) -> Tensor:
        """Codes, one a byte, of some rows."""
        if self.form.layout == NIBBLES:
            return nibbles(stored)
        if self.form.layout in (Q5, HLWQ):
            return bit_run(stored, self.form.width, most_significant_first=self.form.layout == HLWQ)
        return stored

    def _norms(self) -> Tensor:
        norms = self.form.norms.tensor().view(self.form.shape[0], -1)
        if not all(are_norms(some) for some in norms.view(-1).split(_NORMS_AT_ONCE)):
            raise self.form.norms.refusal("holds norms that are negative or not finite")
        return norms

    def _codebook(self, bits: int) -> Tensor:
        """The stored codebook, else the one that layouts without imply; with unused entries for more bits."""
        if not self.form.codebooks:
            return extended(published_codebook(self.bits), bits)
        codebooks = []
        for part, place in self.form.codebooks.items():
            try:
                codebooks.append(extended(stored_codebook(place.tensor(), part == "ct_scaled"), bits))
            except CheckpointError as error:
                raise place.refusal(str(error)) from None
        if len(codebooks) > 1 and not torch.allclose(codebooks[0], codebooks[1], rtol=1e-6, atol=0):
            first, second = self.form.codebooks.values()
            raise first.refusal(f"and {second.name} are different codebooks of one matrix")
        return codebooks[0]

    def _check_meta(self) -> None:
        if self.form.meta is None:
            return
        rows, columns = self.form.shape
        blocks = padded(columns) // BLOCK
        expected = [rows, blocks, BLOCK, rows * blocks * BLOCK, columns]
        found = self.form.meta.tensor().tolist()
        if found != expected[: len(found)]:
            raise self.form.meta.refusal(f"says {found}, but the tensors are of {expected[: len(found)]}")

    def _row_slices(self) -> Iterator[slice]:
        rows, columns = self.form.shape[0], padded(self.form.shape[1])
        at_once = max(1, _CODES_AT_ONCE // columns)
        return (slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once))
