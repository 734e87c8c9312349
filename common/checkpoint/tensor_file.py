"""One safetensors file: what its header says, its tensors read or mapped, and how to write one.

The safetensors library opens a file and checks the header against the file's length. Writing is done here,
because tensors are streamed into the file and its data must begin at a multiple of 4096 bytes: the format
lets the header end in spaces. Which tensors belong in a file is not known here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.checkpoint.file_state import FileState, changed
from common.checkpoint.names import Shape
from common.errors import CheckpointError, Unavailable
from common.json_input import parse_json

WEIGHT_DTYPES = ("F32", "F16", "BF16")
ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "I32": 4, "I64": 8}
DATA_ALIGNMENT = 4096

_TORCH_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


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
                self._state = FileState.of(raw.fileno())
                described = raw.read(int.from_bytes(raw.read(8), "little"))
            entries: dict[str, Any] = parse_json(described)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from None
        entries.pop("__metadata__", None)
        self.data_offset = 8 + len(described)
        self.tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()
        }
        self._offsets = {name: entry["data_offsets"][0] for name, entry in entries.items()}

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

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The tensor, or some rows of it, in memory of its own.

        Raises CheckpointError naming it if the file changed. A file that was cut short while it is mapped
        kills the process that touches it; reading it does not.
        """
        info = self.tensors[name]
        start, stop, _ = rows.indices(info.shape[0]) if info.shape else (0, 1, 1)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        row_bytes = info.size // info.shape[0] if info.shape and info.shape[0] else info.size
        tensor = torch.empty(shape, dtype=_TORCH_DTYPES[info.dtype])
        self._read_into(data(tensor), self.data_offset + self._offsets[name] + start * row_bytes, name)
        return tensor

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file: for files that nobody changes, and who keeps all of it."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def _read_into(self, buffer: memoryview, offset: int, name: str) -> None:
        try:
            with self.path.open("rb", buffering=0) as file:
                while buffer and (count := os.preadv(file.fileno(), [buffer], offset)):
                    buffer, offset = buffer[count:], offset + count
                unchanged = not buffer and FileState.of(file.fileno()) == self._state
        except FileNotFoundError:
            raise changed(self.path, name) from None
        except OSError as error:
            raise Unavailable(f"{self.path}: {name} cannot be read: {error.strerror}") from error
        if not unchanged:
            raise changed(self.path, name)


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
