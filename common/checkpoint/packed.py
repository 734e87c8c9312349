"""The native packed checkpoint, reading side: records as the arena wants them, dense weights beside them.

`config.json` and the tokenizer's files are the source's own. `experts-LLLLL.safetensors` holds one layer: a
uint8 tensor `records` (experts, stride) whose data begin at a multiple of 4096, so that aligned reads put
records straight into frames. `dense.safetensors` holds the dense weights under canonical names; a matrix that
is kept packed lies there as one run of bytes, `NAME.packed` instead of `NAME.weight`. `packed.json` is the
manifest. Everything is checked from headers and sizes at open, and a matrix when it is read, so that nobody
writes damage down again under a fresh checksum; reading every byte again is `Manifest.damaged_files`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from torch import Tensor

from common.checkpoint.manifest import MANIFEST, Manifest
from common.checkpoint.names import dense_shapes, expert_names, packable_dense
from common.checkpoint.plan import BitPlan
from common.checkpoint.source import Matrix, Stored, carried_files
from common.checkpoint.tensor_file import DATA_ALIGNMENT, WEIGHT_DTYPES, TensorFile
from common.checkpoint.values import check_values
from common.errors import CheckpointError
from common.expert_key import ExpertKey
from common.hlwq.matrix import PackedMatrix
from common.model_config import ModelConfig
from common.record import ExpertBits, MatrixLayout, RecordLayouts, matrix_layout, record_layouts

DENSE = "dense.safetensors"
RECORDS = "records"


def is_packed(directory: Path) -> bool:
    """Whether this is a packed checkpoint, of whatever version and in whatever state."""
    return (directory / MANIFEST).is_file()


def layer_file(layer: int) -> str:
    """Name of the file that holds one layer's records."""
    return f"experts-{layer:05d}.safetensors"


def packed_name(name: str) -> str:
    """Name of the tensor that holds a packed dense matrix, from the canonical name."""
    return name.removesuffix(".weight") + ".packed"


def dense_layouts(config: ModelConfig, bits: dict[str, int]) -> dict[str, tuple[MatrixLayout, int]]:
    """Layout and size of each packed dense matrix, by canonical name."""
    shapes = dense_shapes(config)
    return {
        name: matrix_layout(name, shapes[name][0], shapes[name][1], count) for name, count in bits.items()
    }


class PackedCheckpoint:
    """An open packed checkpoint, a `WeightSource`; `open` is the way to get one."""

    def __init__(
        self, directory: Path, manifest: Manifest, config: ModelConfig, layout: RecordLayouts
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.config = config
        self.layout = layout
        self._layers = [TensorFile(directory / layer_file(layer)) for layer in range(config.num_layers)]
        self._dense = TensorFile(directory / DENSE)
        self._dense_layouts = dense_layouts(config, manifest.dense_bits)

    @classmethod
    def open(cls, directory: Path) -> PackedCheckpoint:
        """Check manifest, layout, sizes and headers; raises ConfigError or CheckpointError."""
        manifest = Manifest.read(directory)
        config = ModelConfig.from_directory(directory)
        layout = _check_claims(directory, manifest, config)
        checkpoint = cls(directory, manifest, config, layout)
        checkpoint._check_headers()
        return checkpoint

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def identity(self) -> str:
        return self.fingerprint[:16]

    @property
    def name(self) -> str:
        """What was packed, for people, who are told when its weights are random."""
        name = self.manifest.source["name"]
        return name if not self.synthetic or "synthetic" in name else f"{name} (synthetic)"

    @property
    def synthetic(self) -> bool:
        return self.manifest.synthetic

    @property
    def expert_bits(self) -> tuple[ExpertBits | None, ...]:
        return self.layout.bits

    @property
    def plan(self) -> BitPlan:
        """The bits that everything has here."""
        return BitPlan(self.layout.bits, self.manifest.dense_bits)

    @property
    def num_experts(self) -> int:
        """All routed experts: layers times experts in each."""
        return self.config.num_layers * self.config.n_routed_experts

    @property
    def routed_bytes(self) -> int:
        return self.num_experts * self.layout.stride

    @cached_property
    def dense_stored(self) -> dict[str, Stored]:
        return {name: self._stored(name) for name in dense_shapes(self.config)}

    def expert_stored(self, key: ExpertKey) -> tuple[Stored, Stored]:
        """How the two projections of one expert come out of `expert`, told from headers alone."""
        up, down = (
            Stored((layout.out_features, layout.in_features), "BF16", layout.size, layout.bits)
            for layout in self.layout[key.layer].matrices
        )
        return up, down

    def files(self) -> list[Path]:
        return [self.directory / name for name in (MANIFEST, *self.manifest.files)]

    def carried_files(self) -> list[Path]:
        return carried_files(self.directory)

    def records_file(self, layer: int) -> tuple[Path, int]:
        """The file of one layer's records and the offset of expert 0; expert e follows at e strides."""
        file = self._layers[layer]
        return file.path, file.data_offset

    def record(self, key: ExpertKey) -> Tensor:
        """One record, uint8 (stride,), read into memory of its own."""
        return self._layers[key.layer].read(RECORDS, slice(key.expert, key.expert + 1))[0]

    def expert(self, key: ExpertKey) -> tuple[Matrix, Matrix]:
        """Both projections, as views of one record; CheckpointError naming one that cannot be right."""
        record, names = self.record(key), expert_names(self.config, key)
        layouts = self.layout[key.layer].matrices
        up, down = (
            self._sound(name, layout.view(record)) for name, layout in zip(names, layouts, strict=True)
        )
        return up, down

    def dense_matrix(self, name: str) -> Matrix:
        """One dense weight, read into memory of its own."""
        return self._dense_from(self._dense.read, name)

    def mapped_dense_matrix(self, name: str) -> Matrix:
        """The same as a view of the mapped file, whose pages come and go as memory allows."""
        return self._dense_from(self._dense.tensor, name)

    def _dense_from(self, get: Callable[[str], Tensor], name: str) -> Matrix:
        if name not in self._dense_layouts:
            return get(name)
        layout, _ = self._dense_layouts[name]
        return self._sound(name, layout.view(get(packed_name(name))))

    def _sound(self, name: str, matrix: PackedMatrix) -> PackedMatrix:
        """The matrix, unless it cannot be right."""
        try:
            check_values(matrix)
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory}: {name} {error}") from None
        return matrix

    def _stored(self, name: str) -> Stored:
        if name in self._dense_layouts:
            layout, size = self._dense_layouts[name]
            return Stored((layout.out_features, layout.in_features), "BF16", size, layout.bits)
        info = self._dense.tensors[name]
        return Stored(info.shape, info.dtype, info.size)

    def _check_headers(self) -> None:
        shape = (self.config.n_routed_experts, self.layout.stride)
        for file in self._layers:
            file.check(RECORDS, shape, ("U8",))
            if list(file.tensors) != [RECORDS] or file.data_offset % DATA_ALIGNMENT:
                raise CheckpointError(
                    f"{file.path}: the records must stand alone and begin at a multiple of {DATA_ALIGNMENT}"
                )
        for name, dense_shape in dense_shapes(self.config).items():
            if name in self._dense_layouts:
                self._dense.check(packed_name(name), (self._dense_layouts[name][1],), ("U8",))
            else:
                self._dense.check(name, dense_shape, WEIGHT_DTYPES)


def _check_claims(directory: Path, manifest: Manifest, config: ModelConfig) -> RecordLayouts:
    """The manifest speaks of this model, this record layout and the files that lie here."""
    if manifest.layers != config.num_layers or len(manifest.expert_bits) != config.num_layers:
        raise CheckpointError(
            f"{directory}: {MANIFEST} speaks of {manifest.layers} layers and the bits of "
            f"{len(manifest.expert_bits)}, config.json of {config.num_layers}: pack the model again"
        )
    layout = record_layouts(config, [ExpertBits(up, down) for up, down in manifest.expert_bits])
    claimed = (manifest.layout, manifest.stride, manifest.experts)
    if claimed != (layout.digest, layout.stride, config.n_routed_experts):
        raise CheckpointError(
            f"{directory}: the records were packed in another layout than config.json and {MANIFEST} imply "
            f"(layout {manifest.layout}, expected {layout.digest}): pack the model again"
        )
    unknown = sorted(manifest.dense_bits.keys() - set(packable_dense(config)))
    if unknown:
        raise CheckpointError(f"{directory / MANIFEST} has packed dense matrices that are none: {unknown[0]}")
    needed = [DENSE, "config.json", *map(layer_file, range(config.num_layers))]
    unlisted = [name for name in needed if name not in manifest.files]
    if unlisted:
        raise CheckpointError(f"{directory / MANIFEST} does not list {', '.join(unlisted)}")
    manifest.check_sizes(directory)
    return layout
