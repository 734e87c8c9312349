"""What a checkpoint gives to whoever packs, unpacks or measures it, whatever its layout on disk.

Every kind of checkpoint that `open_checkpoint` opens is a `WeightSource`. A matrix comes out as it is stored:
plain, or packed with its own codes, norms and codebook, so that nobody decodes what need not be decoded. A
packed one is checked on its way out: what comes out can be right.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from common.checkpoint.names import Shape
from common.errors import Unavailable
from common.expert_key import ExpertKey
from common.hlwq.matrix import PackedMatrix
from common.model_config import ModelConfig
from common.record import ExpertBits

Matrix = Tensor | PackedMatrix

# The key that marks random weights in a config.json, where no manifest does.
SYNTHETIC = "synthetic"

# What travels with the weights: the shape of the model, its tokenizer and how to prompt it.
_CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def carried_files(directory: Path) -> list[Path]:
    """The small files of a checkpoint that every form of it has: config, tokenizer, chat template."""
    return [path for name in _CARRIED if (path := directory / name).is_file()]


def read_carried(path: Path) -> bytes:
    """One of them, whole; raises Unavailable naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}") from error


class Stored(NamedTuple):
    """How one weight is stored: its shape, its dtype in the words of safetensors, its bytes on disk.

    `bits` is that of a matrix stored as HLWQ codes, whose dtype is then what it decodes to; else None.
    """

    shape: Shape
    dtype: str
    size: int
    bits: int | None = None


class WeightSource(Protocol):
    """An open checkpoint. Nothing is read before it is asked for."""

    @property
    def directory(self) -> Path: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def identity(self) -> str:
        """Changes with the checkpoint: a name for caches, not a checksum."""

    @property
    def synthetic(self) -> bool:
        """Random weights in a real shape, for benchmarks."""

    @property
    def dense_stored(self) -> dict[str, Stored]:
        """How every dense weight is stored, by canonical name, in the order of the forward pass."""

    @property
    def expert_bits(self) -> tuple[ExpertBits | None, ...]:
        """For each layer, the bits its experts are stored at; None where they are not stored as codes."""

    @property
    def routed_bytes(self) -> int:
        """Bytes of all routed experts as they are stored."""

    def files(self) -> list[Path]:
        """Every file that the config, the weights and what travels with them are read from."""

    def carried_files(self) -> list[Path]:
        """The small files that travel with the weights: config, tokenizer, chat template."""

    def dense_matrix(self, name: str) -> Matrix:
        """One dense weight by canonical name; raises CheckpointError naming it."""

    def expert_stored(self, key: ExpertKey) -> tuple[Stored, Stored]:
        """How the two projections of one routed expert come out of `expert`, told without reading them."""

    def expert(self, key: ExpertKey) -> tuple[Matrix, Matrix]:
        """The up (out, in) and down (out, in) projections of one routed expert.

        Packed ones have the bits that `expert_bits` says. Raises CheckpointError naming the tensor.
        """
