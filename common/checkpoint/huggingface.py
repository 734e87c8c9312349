"""A NemotronH directory as models are published, read lazily: plain, or quantized in a published HLWQ layout.

One file or shards; BF16, F16 or F32; names with `backbone.` (published) or `model.` (transformers' own);
experts one by one or, if plain, stacked. Each matrix is plain or quantized by itself. What headers tell is
checked at open, and nothing is loaded until it is asked for. Values of plain tensors are not looked at here:
packing refuses what is not finite.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from common.checkpoint.file_state import states_of
from common.checkpoint.names import (
    Shape,
    canonical,
    dense_shapes,
    expert_names,
    expert_shapes,
    packable_dense,
    stacked_names,
)
from common.checkpoint.polar_config import POLAR_CONFIG, PolarConfig
from common.checkpoint.published import PublishedMatrix
from common.checkpoint.published_form import part_of, tell_form
from common.checkpoint.shards import Place, find_tensors
from common.checkpoint.source import SYNTHETIC, Matrix, Stored, carried_files
from common.checkpoint.tensor_file import WEIGHT_DTYPES
from common.errors import CheckpointError
from common.expert_key import ExpertKey
from common.hlwq.planes import RAW_BITS
from common.model_config import ModelConfig
from common.record import ExpertBits

_IGNORED = "mtp."  # weights of multi-token prediction, which transformers ignores as well
_logger = logging.getLogger(__name__)

Parts = dict[str, Place]


class HuggingFaceCheckpoint:
    """An open directory, a `WeightSource`; memory holds what was asked for, beside the page cache."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        """Empty; `open` is the way to get one that holds its tensors."""
        self.directory = directory
        self.config = config
        self._dense_shapes = dense_shapes(config)
        self._packable = frozenset(packable_dense(config))
        self._plain: dict[str, Place] = {}
        self._published: dict[str, PublishedMatrix] = {}

    @classmethod
    def open(cls, directory: Path) -> HuggingFaceCheckpoint:
        """Check config, files and headers; raises ConfigError or CheckpointError naming file and tensor."""
        checkpoint = cls(directory, ModelConfig.from_directory(directory))
        plain, parts = _sort(find_tensors(directory))
        checkpoint._take(plain, parts, PolarConfig.read(directory))
        return checkpoint

    def files(self) -> list[Path]:
        """Every file that the config, the weights and what travels with them are read from."""
        places = [*self._plain.values(), *(part for m in self._published.values() for part in m.form.places)]
        files = {place.file.path for place in places} | set(self.carried_files())
        if self._published and (self.directory / POLAR_CONFIG).is_file():
            files.add(self.directory / POLAR_CONFIG)
        return sorted(files)

    @property
    def identity(self) -> str:
        """Hash of the config and of every used file's name, size and time of change, not of contents."""
        stats = sorted((path.name, *state) for path, state in states_of(self.files()).items())
        config = (self.directory / "config.json").read_bytes()
        return hashlib.sha256(config + json.dumps(stats).encode()).hexdigest()[:16]

    @property
    def synthetic(self) -> bool:
        """As `unpack` notes it in the config of a synthetic checkpoint."""
        config = json.loads((self.directory / "config.json").read_text())
        return config.get(SYNTHETIC) is True

    @property
    def layouts(self) -> dict[str, int]:
        """How many matrices are quantized in which published layout."""
        return dict(Counter(matrix.form.layout for matrix in self._published.values()))

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes on disk of every tensor and quantized matrix that the model needs, by canonical name."""
        plain = {name: place.info.size for name, place in self._plain.items()}
        return plain | {name: matrix.size for name, matrix in self._published.items()}

    @cached_property
    def dense_stored(self) -> dict[str, Stored]:
        return {name: self._stored(name) for name in self._dense_shapes}

    @cached_property
    def expert_bits(self) -> tuple[ExpertBits | None, ...]:
        """The widest codes of each projection in a layer; 16 where one of the two is plain."""
        return tuple(self._layer_bits(layer) for layer in range(self.config.num_layers))

    def expert_stored(self, key: ExpertKey) -> tuple[Stored, Stored]:
        """How the two projections of one expert come out of `expert`, told from headers alone."""
        stacked = stacked_names(self.config, key.layer)
        if stacked[0] in self._plain:
            infos = [self._plain[name].info for name in stacked]
            up, down = (Stored(info.shape[1:], info.dtype, info.size // info.shape[0]) for info in infos)
        else:
            widths = self.expert_bits[key.layer] or (None, None)
            up, down = (
                self._stored(name)._replace(bits=bits if name in self._published else None)
                for name, bits in zip(expert_names(self.config, key), widths, strict=True)
            )
        return up, down

    @property
    def routed_bytes(self) -> int:
        return sum(size for name, size in self.sizes.items() if name not in self._dense_shapes)

    def carried_files(self) -> list[Path]:
        return carried_files(self.directory)

    def dense_matrix(self, name: str) -> Matrix:
        """One dense weight: as it is stored, or in BF16 what is quantized but cannot be used packed."""
        if name in self._published and name not in self._packable:
            return self._published[name].decode()
        return self.matrix(name)

    def expert(self, key: ExpertKey) -> tuple[Matrix, Matrix]:
        """The up (out, in) and down (out, in) projections of one routed expert."""
        stacked = stacked_names(self.config, key.layer)
        if stacked[0] in self._plain:
            one = slice(key.expert, key.expert + 1)
            return self._plain[stacked[0]].tensor(one)[0], self._plain[stacked[1]].tensor(one)[0]
        names, bits = expert_names(self.config, key), self.expert_bits[key.layer] or (None, None)
        return self.matrix(names[0], bits[0]), self.matrix(names[1], bits[1])

    def matrix(self, name: str, bits: int | None = None) -> Matrix:
        """What is stored under a name of `sizes`: plain, or packed at `bits`, its own by default."""
        if name in self._published:
            return self._published[name].read(bits)
        return self._plain[name].tensor()

    def _stored(self, name: str) -> Stored:
        matrix = self._published.get(name)
        if matrix is None:
            info = self._plain[name].info
            return Stored(info.shape, info.dtype, info.size)
        bits = matrix.bits if name in self._packable else None
        return Stored(matrix.form.shape, "BF16", matrix.size, bits)

    def _layer_bits(self, layer: int) -> ExpertBits | None:
        experts = range(self.config.n_routed_experts)
        pairs = [expert_names(self.config, ExpertKey(layer, expert)) for expert in experts]
        widths = [
            [self._published[name].bits for name in names if name in self._published]
            for names in zip(*pairs, strict=True)
        ]
        if not any(widths):
            return None
        return ExpertBits(*(max(found, default=RAW_BITS) for found in widths))

    def _take(self, plain: dict[str, Place], parts: dict[str, Parts], polar_config: PolarConfig) -> None:
        """Take what the model needs, each in the right form; the others are dropped."""
        needed = {**self._dense_shapes, **self._expert_shapes(plain)}
        missing = [name for name in needed if name not in plain and name not in parts]
        if missing:
            raise CheckpointError(f"{self.directory} lacks {_some(missing)}")
        for name, shape in needed.items():
            if name in plain and name in parts:
                others = ", ".join(place.name for place in parts[name].values())
                raise plain[name].refusal(f"is there twice, quantized too ({others}): remove one")
            if name in parts:
                form = tell_form(parts[name], shape, polar_config.claims(name))
                self._published[name] = PublishedMatrix(form)
            else:
                plain[name].file.check(plain[name].name, shape, WEIGHT_DTYPES)
                self._plain[name] = plain[name]
        self._judge_extra([name for name in (*plain, *parts) if name not in needed])

    def _judge_extra(self, extra: list[str]) -> None:
        """Refuse experts that are there in two forms, warn of what has no place in this architecture."""
        experts: set[str] = set()
        for layer in range(self.config.num_layers):
            experts.update(stacked_names(self.config, layer))
            for expert in range(self.config.n_routed_experts):
                experts.update(expert_names(self.config, ExpertKey(layer, expert)))
        twice = [name for name in extra if name in experts]
        if twice:
            raise CheckpointError(f"{self.directory} has {_some(twice)} twice, stacked and one by one")
        surprising = [name for name in extra if not name.startswith(_IGNORED)]
        if surprising:
            _logger.warning(
                "%s: ignoring %s, unknown to this architecture", self.directory, _some(surprising)
            )

    def _expert_shapes(self, plain: dict[str, Place]) -> dict[str, Shape]:
        """Names and shapes of all routed experts, one by one or stacked as each layer has them here."""
        shapes: dict[str, Shape] = {}
        single = expert_shapes(self.config)
        count = self.config.n_routed_experts
        for layer in range(self.config.num_layers):
            stacked = stacked_names(self.config, layer)
            if stacked[0] in plain:
                shapes.update((name, (count, *shape)) for name, shape in zip(stacked, single, strict=True))
                continue
            for expert in range(count):
                shapes.update(zip(expert_names(self.config, ExpertKey(layer, expert)), single, strict=True))
        return shapes


def _sort(places: Iterable[Place]) -> tuple[dict[str, Place], dict[str, Parts]]:
    """Plain tensors by canonical name; the parts of quantized matrices by the matrix' canonical name."""
    plain: dict[str, Place] = {}
    quantized: dict[str, Parts] = {}
    for place in places:
        matrix, part = part_of(place.name) or (canonical(place.name), None)
        taken, key = (plain, matrix) if part is None else (quantized.setdefault(matrix, {}), part)
        if key in taken:
            other = taken[key]
            raise place.refusal(f"is there twice, as {other.name} in {other.file.path.name} too: remove one")
        taken[key] = place
    return plain, quantized


def _some(names: list[str]) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
