"""One safetensors file: what its header says, its tensors as views of the mapped file, and how to write one.

Reading goes through the safetensors library, which checks the header against the file's length. Writing is
done here, because tensors are streamed into the file and its data must begin at a multiple of 4096 bytes: the
format lets the header end in spaces. Which tensors belong in a file is not known here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.checkpoint.names import Shape
from common.errors import CheckpointError

WEIGHT_DTYPES = ("F32", "F16", "BF16")
ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
DATA_ALIGNMENT = 4096


class TensorInfo(NamedTuple):
    """What a header says of one tensor; `dtype` in the words of safetensors."""

    dtype: str
    shape: Shape

    @property
    def size(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


class TensorFile:
    """An open safetensors file; `tensors` is its header, `data_offset` where its data begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")  # its methods carry no types
            with path.open("rb") as raw:
                self.data_offset = 8 + int.from_bytes(raw.read(8), "little")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from None
        self.tensors = self._read_header()

    def check(self, name: str, shape: Shape, dtypes: tuple[str, ...]) -> None:
        """Raise CheckpointError unless tensor `name` is here with this shape and one of these dtypes."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} lacks tensor {name!r}")
        if info.shape != shape:
            raise CheckpointError(
                f"{self.path}: {name} has shape {list(info.shape)}, but the model needs {list(shape)}"
            )
        if info.dtype not in dtypes:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {info.dtype}, which is not one of {', '.join(dtypes)}"
            )

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file: pages are read from disk when they are touched."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def _read_header(self) -> dict[str, TensorInfo]:
        entries = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 (no mapping)
        return {
            name: TensorInfo(entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries.items()
        }


def header(tensors: Mapping[str, TensorInfo]) -> bytes:
    """The head of a file whose data are these tensors in this order, padded to a multiple of 4096 bytes."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        described[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.size],
        }
        offset += info.size
    text = json.dumps(described, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8)
    return len(text).to_bytes(8, "little") + text


def data(tensor: Tensor) -> memoryview:
    """The tensor's bytes as they are stored, without a copy when it is contiguous."""
    raw: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return raw
