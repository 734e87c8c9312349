"""`dense.safetensors` of a packed checkpoint, as it is written: one weight at a time, packed by rows.

A weight is written as its source stores it, or packed where the plan says so. What lies in the file is
described in `packed`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from common.checkpoint.calibration import Calibration
from common.checkpoint.checksum import ChecksummedFile
from common.checkpoint.packed import dense_layouts, packed_name
from common.checkpoint.packing import (
    Quantization,
    in_order,
    memory_of_rows,
    pack_rows,
    quantizes,
    row_slices,
    rows_of,
    unpacked,
)
from common.checkpoint.plan import BitPlan
from common.checkpoint.source import Matrix, WeightSource
from common.checkpoint.tensor_file import ELEMENT_BYTES, TensorInfo, data, header
from common.checkpoint.values import is_finite
from common.errors import CheckpointError
from common.hlwq.calibrated import error_feedback
from common.hlwq.matrix import PackedMatrix
from common.record import MatrixLayout

Count = Callable[[int], None]


class DenseFile:
    """The file that `plan` makes of a source's dense weights, from its headers alone."""

    def __init__(
        self, source: WeightSource, plan: BitPlan, calibration: Calibration | None, codebook: str
    ) -> None:
        self._source = source
        self._calibration = calibration
        self._codebook = codebook
        self._layouts = dense_layouts(source.config, plan.dense)
        infos = {name: self._info(name) for name in source.dense_stored}
        # Wide elements first: so all stay aligned.
        self._order = sorted(infos, key=lambda name: -ELEMENT_BYTES[infos[name].dtype])
        self._header = header(
            {packed_name(name) if name in self._layouts else name: infos[name] for name in self._order}
        )
        self.size = len(self._header) + sum(info.size for info in infos.values())

    def write(self, count: Count, file: ChecksummedFile) -> None:
        """Write all of it; `count` is told the source's bytes as they are done.

        Raises CheckpointError naming the weight that cannot be written.
        """
        file.write(self._header)
        for name in self._order:
            matrix = self._source.dense_matrix(name)
            try:
                self._write(file, name, matrix, count)
            except CheckpointError as error:
                raise CheckpointError(f"{self._source.directory}: {name}: {error}") from None

    def _info(self, name: str) -> TensorInfo:
        if name in self._layouts:
            return TensorInfo("U8", (self._layouts[name][1],))
        stored = self._source.dense_stored[name]
        return TensorInfo(stored.dtype, stored.shape)

    def _write(self, file: ChecksummedFile, name: str, matrix: Matrix, count: Count) -> None:
        size = self._source.dense_stored[name].size
        if name in self._layouts:
            layout, packed_size = self._layouts[name]
            feedback = None
            if self._calibration is not None and quantizes(matrix, layout.bits):
                feedback = error_feedback(self._calibration.dense(name))
            quantization = Quantization(self._codebook, feedback)
            file.write(data(_packed_run(matrix, layout, packed_size, quantization, size, count)))
            return
        if isinstance(matrix, PackedMatrix):
            for rows in row_slices(matrix):
                file.write(data(unpacked(rows_of(matrix, rows))))
        else:
            if not is_finite(matrix):
                raise CheckpointError("weights are not finite")
            file.write(data(matrix))
        count(size)


def _packed_run(
    matrix: Matrix,
    layout: MatrixLayout,
    packed_size: int,
    quantization: Quantization,
    size: int,
    count: Count,
) -> Tensor:
    """The packed bytes of a matrix, made by several threads; `count` is told shares of `size`."""
    run = torch.zeros(packed_size, dtype=torch.uint8)
    calibrated = quantization.feedback is not None
    slices = row_slices(matrix, calibrated)
    jobs = (partial(pack_rows, matrix, layout, run, quantization, rows) for rows in slices)
    with closing(in_order(jobs, memory_of_rows(calibrated))) as pieces:
        for done, _ in enumerate(pieces):
            count(size * (done + 1) // len(slices) - size * done // len(slices))
    return run
