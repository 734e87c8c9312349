"""An unpacked Hugging Face NemotronH directory, read lazily.

One `model.safetensors` or the shards that `model.safetensors.index.json` names; BF16, F16 or F32; names
with `backbone.` (published) or `model.` (in transformers' memory); experts one by one or stacked. Everything
is checked from the headers at open, and nothing is loaded until it is asked for. Values are not looked at
here: packing refuses what is not finite.
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from common.checkpoint.names import Shape, canonical, dense_shapes, expert_names, expert_shapes, stacked_names
from common.checkpoint.source import Matrix, Stored, carried_files
from common.checkpoint.tensor_file import WEIGHT_DTYPES, TensorFile, TensorInfo
from common.errors import CheckpointError
from common.expert_key import ExpertKey
from common.model_config import ModelConfig
from common.record import ExpertBits

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_IGNORED = "mtp."  # weights of multi-token prediction, which transformers ignores as well
_logger = logging.getLogger(__name__)


class _Place(NamedTuple):
    """Where a tensor lies: its file, and its name in that file."""

    file: TensorFile
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.file.tensors[self.name]


class HuggingFaceCheckpoint:
    """An open directory, a `WeightSource`; plain tensors come out as views of the mapped files."""

    def __init__(self, directory: Path, config: ModelConfig, places: dict[str, _Place]) -> None:
        self.directory = directory
        self.config = config
        self._places = places
        self._dense_shapes = dense_shapes(config)

    @classmethod
    def open(cls, directory: Path) -> HuggingFaceCheckpoint:
        """Check config, files and headers; raises ConfigError or CheckpointError naming file and tensor."""
        checkpoint = cls(directory, ModelConfig.from_directory(directory), _find_tensors(directory))
        checkpoint._check()
        return checkpoint

    @property
    def identity(self) -> str:
        """Hash of the config and of every used file's name, size and time of change, not of contents."""
        files = {place.file.path for place in self._places.values()} | set(self.carried_files())
        stats = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        config = (self.directory / "config.json").read_bytes()
        return hashlib.sha256(config + json.dumps(stats).encode()).hexdigest()[:16]

    @property
    def synthetic(self) -> bool:
        return False

    @cached_property
    def dense_stored(self) -> dict[str, Stored]:
        infos = {name: self._places[name].info for name in self._dense_shapes}
        return {name: Stored(info.shape, info.dtype, info.size) for name, info in infos.items()}

    @property
    def expert_bits(self) -> tuple[ExpertBits | None, ...]:
        return (None,) * self.config.num_layers

    @property
    def routed_bytes(self) -> int:
        return sum(place.info.size for name, place in self._places.items() if name not in self._dense_shapes)

    def carried_files(self) -> list[Path]:
        return carried_files(self.directory)

    def dense_matrix(self, name: str) -> Matrix:
        """One dense tensor, as a view of the mapped file."""
        return self._tensor(name)

    def expert(self, key: ExpertKey) -> tuple[Matrix, Matrix]:
        """The up (out, in) and down (out, in) projections of one routed expert."""
        names = expert_names(self.config, key)
        if names[0] in self._places:
            return self._tensor(names[0]), self._tensor(names[1])
        up, down = stacked_names(self.config, key.layer)
        return self._tensor(up)[key.expert], self._tensor(down)[key.expert]

    def _tensor(self, name: str) -> Tensor:
        place = self._places[name]
        return place.file.tensor(place.name)

    def _check(self) -> None:
        """Every needed tensor is there in the right form; the others are dropped."""
        needed = {**self._dense_shapes, **self._expert_shapes()}
        missing = [name for name in needed if name not in self._places]
        if missing:
            raise CheckpointError(f"{self.directory} lacks {_some(missing)}")
        for name, shape in needed.items():
            place = self._places[name]
            place.file.check(place.name, shape, WEIGHT_DTYPES)
        extra = [name for name in self._places if name not in needed]
        surprising = [name for name in extra if not name.startswith(_IGNORED)]
        if surprising:
            _logger.warning(
                "%s: ignoring %s, unknown to this architecture", self.directory, _some(surprising)
            )
        for name in extra:
            del self._places[name]

    def _expert_shapes(self) -> dict[str, Shape]:
        """Names and shapes of all routed experts, one by one or stacked as each layer has them here."""
        shapes: dict[str, Shape] = {}
        single = expert_shapes(self.config)
        count = self.config.n_routed_experts
        for layer in range(self.config.num_layers):
            stacked = stacked_names(self.config, layer)
            if stacked[0] in self._places:
                shapes.update((name, (count, *shape)) for name, shape in zip(stacked, single, strict=True))
                continue
            for expert in range(count):
                shapes.update(zip(expert_names(self.config, ExpertKey(layer, expert)), single, strict=True))
        return shapes


def _find_tensors(directory: Path) -> dict[str, _Place]:
    """Every tensor of the directory by canonical name."""
    if (directory / SINGLE).is_file():
        file = TensorFile(directory / SINGLE)
        found = [(name, file) for name in file.tensors]
    elif (directory / INDEX).is_file():
        found = _read_index(directory)
    else:
        raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}")
    places: dict[str, _Place] = {}
    for name, file in found:
        if canonical(name) in places:
            raise CheckpointError(
                f"{file.path}: {name} is there twice, as {places[canonical(name)].name} too"
            )
        places[canonical(name)] = _Place(file, name)
    return places


def _read_index(directory: Path) -> list[tuple[str, TensorFile]]:
    path = directory / INDEX
    try:
        index = json.loads(path.read_text())
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
    return [(name, files[shard]) for name, shard in weight_map.items()]


def _some(names: list[str]) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
