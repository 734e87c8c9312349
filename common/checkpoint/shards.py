"""Which file of a directory holds which tensor: one file, the shards of an index, or all files there are.

Names are as the files have them. What the tensors mean, and which of them a model needs, is not known here.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from common.checkpoint.tensor_file import TensorFile, TensorInfo
from common.errors import CheckpointError
from common.json_input import parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Place(NamedTuple):
    """Where a tensor lies: its file, and its name in that file."""

    file: TensorFile
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.file.tensors[self.name]

    def tensor(self, rows: slice = slice(None)) -> Tensor:
        """The tensor or some rows of it, read into memory of its own."""
        return self.file.read(self.name, rows)

    def refusal(self, complaint: str) -> CheckpointError:
        """The error that says what is wrong with this tensor."""
        return CheckpointError(f"{self.file.path}: {self.name} {complaint}")


def find_tensors(directory: Path) -> list[Place]:
    """Every tensor of the directory; raises CheckpointError for what is no file of tensors, or no index."""
    if (directory / SINGLE).is_file():
        paths = [directory / SINGLE]
    elif (directory / INDEX).is_file():
        return _read_index(directory)
    else:  # some publishers leave the index away
        paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX} nor other safetensors files")
    files = [TensorFile(path) for path in paths]
    return [Place(file, name) for file in files for name in file.tensors]


def _read_index(directory: Path) -> list[Place]:
    path = directory / INDEX
    try:
        index = parse_json(path.read_text())
        weight_map = {str(name): str(shard) for name, shard in index["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of shards: {error!r}") from None
    files: dict[str, TensorFile] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:  # an index is foreign input: it must not lead out of its directory
            raise CheckpointError(f"{path} names a shard outside the directory: {shard!r}")
        files[shard] = TensorFile(directory / shard)
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise CheckpointError(f"{path} places {name!r} in {shard}, which does not hold it")
    return [Place(files[shard], name) for name, shard in weight_map.items()]
