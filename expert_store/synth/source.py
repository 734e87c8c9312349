"""A synthetic model as a source of weights: what is asked for is drawn at that moment, always the same.

Every matrix comes out packed at the bits it is to have, and by rows, so writing a packed checkpoint quantizes
nothing and keeps little in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from common.checkpoint.names import dense_shapes, expert_names, expert_shapes, packable_dense
from common.checkpoint.packed import PackedCheckpoint
from common.checkpoint.packed_writer import pack
from common.checkpoint.packing import unpacked
from common.checkpoint.plan import make_plan
from common.checkpoint.source import Matrix, Stored, carried_files
from common.checkpoint.tensor_file import TensorInfo
from common.expert_key import ExpertKey
from common.hlwq import native
from common.hlwq.planes import RAW_BITS
from common.model_config import ModelConfig
from common.record import ExpertBits, RecordLayouts, matrix_layout, record_layouts
from expert_store.synth.dense import CORRECTION_BIAS, dtype_of, standard_deviation, vector
from expert_store.synth.records import BlockPool, DrawnMatrix, gaussian_blocks, generator
from expert_store.synth.router import correction_bias, popularity
from expert_store.synth.tokenizer import write_tokenizer


@dataclass(frozen=True)
class Synthesis:
    """Everything that decides the bytes of a synthetic checkpoint."""

    shape: str  # the name of the architecture whose sizes these are
    config: dict[str, Any]  # config.json
    bits: int
    dense_bits: int
    seed: int
    skew: float

    @property
    def name(self) -> str:
        """What checkpoints, stores and workers call it."""
        blocks = len(self.config["hybrid_override_pattern"])
        return f"synthetic {self.shape}, {blocks} blocks, seed {self.seed}, skew {self.skew:g}"


def synthesize(
    synthesis: Synthesis, destination: Path, progress: Callable[[int, int], None]
) -> PackedCheckpoint:
    """Write the packed checkpoint `destination`, which must not exist; raises what `pack` raises."""
    # One thread draws faster than checksums are computed, which is what the other cores are for.
    with TemporaryDirectory() as directory, native.one_thread():
        source = SyntheticSource(Path(directory), synthesis)
        details = {"shape": synthesis.shape, "seed": str(synthesis.seed), "skew": f"{synthesis.skew:g}"}
        return pack(source, destination, make_plan(source), progress, synthesis.name, details)


class SyntheticSource:
    """A `WeightSource`; `directory` gets the small files that a checkpoint carries."""

    def __init__(self, directory: Path, synthesis: Synthesis) -> None:
        self.directory = directory
        self.synthesis = synthesis
        self.config = ModelConfig.from_dict(synthesis.config)
        (directory / "config.json").write_text(json.dumps(synthesis.config, indent=2) + "\n")
        write_tokenizer(directory, self.config.vocab_size, self.config.max_position_embeddings)
        blocks = gaussian_blocks(synthesis.seed)
        widths = {synthesis.bits, synthesis.dense_bits, RAW_BITS}
        self._pools = {bits: BlockPool(blocks, bits) for bits in widths}
        self._shapes = dense_shapes(self.config)
        self._packed_dense = packable_dense(self.config) if synthesis.dense_bits != RAW_BITS else ()

    @property
    def identity(self) -> str:
        return hashlib.sha256(repr(self.synthesis).encode()).hexdigest()[:16]

    @property
    def synthetic(self) -> bool:
        return True

    @cached_property
    def dense_stored(self) -> dict[str, Stored]:
        return {name: self._stored(name) for name in self._shapes}

    @property
    def expert_bits(self) -> tuple[ExpertBits, ...]:
        return (ExpertBits(self.synthesis.bits, self.synthesis.bits),) * self.config.num_layers

    @property
    def routed_bytes(self) -> int:
        return self.config.num_layers * self.config.n_routed_experts * self._layouts.stride

    def files(self) -> list[Path]:
        return self.carried_files()

    def carried_files(self) -> list[Path]:
        return carried_files(self.directory)

    def dense_matrix(self, name: str) -> Matrix:
        """One dense weight; the correction bias of a router costs a simulation."""
        shape = self._shapes[name]
        if name.endswith(CORRECTION_BIAS):
            return self._correction_bias(name)
        if len(shape) != 2:
            return vector(self.config, name, shape, generator(self.synthesis.seed, name))
        return self._matrix(
            name, shape, self.synthesis.dense_bits if name in self._packed_dense else RAW_BITS
        )

    def expert_stored(self, key: ExpertKey) -> tuple[Stored, Stored]:
        up, down = (
            Stored((layout.out_features, layout.in_features), "BF16", layout.size, layout.bits)
            for layout in self._layouts[key.layer].matrices
        )
        return up, down

    def expert(self, key: ExpertKey) -> tuple[Matrix, Matrix]:
        """The up (out, in) and down (out, in) projections of one routed expert, packed."""
        names, shapes = expert_names(self.config, key), expert_shapes(self.config)
        up, down = (
            self._matrix(name, shape, self.synthesis.bits) for name, shape in zip(names, shapes, strict=True)
        )
        return up, down

    @cached_property
    def _layouts(self) -> RecordLayouts:
        return record_layouts(self.config, self.expert_bits)

    def _correction_bias(self, name: str) -> Tensor:
        config = self.config
        gate = unpacked(self.dense_matrix(name.removesuffix(CORRECTION_BIAS) + "gate.weight"))
        rng = generator(self.synthesis.seed, name)
        target = popularity(config.n_routed_experts, config.num_experts_per_tok, self.synthesis.skew)
        ranks = torch.from_numpy(rng.permutation(config.n_routed_experts))
        return correction_bias(gate, config.num_experts_per_tok, target[ranks], rng)

    def _matrix(self, name: str, shape: tuple[int, ...], bits: int) -> DrawnMatrix:
        rows, columns = shape
        deviation = standard_deviation(self.config, name)
        return self._pools[bits].matrix(rows, columns, deviation, generator(self.synthesis.seed, name))

    def _stored(self, name: str) -> Stored:
        shape, bits = self._shapes[name], self.synthesis.dense_bits
        if name in self._packed_dense:
            rows, columns = shape
            return Stored(shape, "BF16", matrix_layout(name, rows, columns, bits)[1], bits)
        info = TensorInfo(dtype_of(name), shape)
        return Stored(shape, info.dtype, info.size)
