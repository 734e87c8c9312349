"""`polar_config.json`: what a published directory says of its matrices beside their tensors.

Believed only where the tensors leave something open, which is the bits of codes without a codebook; a block
size other than ours is passed on to be refused. Its `format` and its flags are not read: publishers' format
strings do not always fit their tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.checkpoint.names import canonical
from common.errors import CheckpointError
from common.json_input import parse_json

POLAR_CONFIG = "polar_config.json"


class Claims(NamedTuple):
    """What is said of one matrix, unchecked; None where nothing is."""

    bits: object
    block_size: object


@dataclass(frozen=True)
class PolarConfig:
    """The file's claims, by canonical name of the matrix with `.weight`."""

    general: dict[str, Any]
    layers: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, directory: Path) -> PolarConfig:
        """Read the file, which may be missing; raises CheckpointError when it is no such file."""
        path = directory / POLAR_CONFIG
        if not path.is_file():
            return cls({}, {})
        try:
            general = parse_json(path.read_text())
            layers = general.get("layers") or {}
            named = {matrix_name(name): dict(layer) for name, layer in layers.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error!r}; without it, tensors alone are read"
            ) from None
        return cls(general, named)

    def claims(self, name: str) -> Claims:
        """Of the matrix `name`: its own entry, else what the file says in general."""
        layer = self.layers.get(name, {})
        return Claims(*(layer.get(key, self.general.get(key)) for key in Claims._fields))


def matrix_name(name: str) -> str:
    """The canonical name of a matrix that a publisher calls `name`: dots may be `__`, `.weight` left away."""
    return canonical(name.replace("__", ".").removesuffix(".weight") + ".weight")
