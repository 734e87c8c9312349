"""The native packed checkpoint, reading side: records as the arena wants them, dense weights beside them.

`config.json` and the tokenizer's files are the source's own. `experts-LLLLL.safetensors` holds one layer: a
uint8 tensor `records` (experts, stride) whose data begin at a multiple of 4096, so that aligned reads put
records straight into frames. `dense.safetensors` holds the dense weights under canonical names, and the
codebooks, one a layer and projection. `packed.json` is the manifest. Everything is checked from headers and
sizes at open; reading every byte again is `Manifest.damaged_files`.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from common.checkpoint.manifest import MANIFEST, Manifest
from common.checkpoint.names import dense_shapes
from common.checkpoint.tensor_file import DATA_ALIGNMENT, WEIGHT_DTYPES, TensorFile
from common.errors import CheckpointError
from common.hlwq.planes import RAW_BITS
from common.model_config import ModelConfig
from common.record import MatrixLayout, RecordLayout, record_layout

DENSE = "dense.safetensors"
RECORDS = "records"


def is_packed(directory: Path) -> bool:
    """Whether this is a packed checkpoint, of whatever version and in whatever state."""
    return (directory / MANIFEST).is_file()


def layer_file(layer: int) -> str:
    """Name of the file that holds one layer's records."""
    return f"experts-{layer:05d}.safetensors"


def codebook_name(matrix: MatrixLayout) -> str:
    """Name of the tensor that holds the codebooks of one projection, float32 (layers, levels)."""
    return f"hlwq.codebooks.{matrix.name}"


class PackedCheckpoint:
    """An open packed checkpoint; `open` is the way to get one."""

    def __init__(
        self, directory: Path, manifest: Manifest, config: ModelConfig, layout: RecordLayout
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.config = config
        self.layout = layout
        self._layers = [TensorFile(directory / layer_file(layer)) for layer in range(config.num_layers)]
        self._dense = TensorFile(directory / DENSE)

    @classmethod
    def open(cls, directory: Path) -> PackedCheckpoint:
        """Check manifest, layout, sizes and headers; raises ConfigError or CheckpointError."""
        manifest = Manifest.read(directory)
        config = ModelConfig.from_directory(directory)
        layout = record_layout(config, manifest.up_bits, manifest.down_bits)
        _check_claims(directory, manifest, config, layout)
        checkpoint = cls(directory, manifest, config, layout)
        checkpoint._check_headers()
        return checkpoint

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def num_experts(self) -> int:
        """All routed experts: layers times experts in each."""
        return self.config.num_layers * self.config.n_routed_experts

    def records_file(self, layer: int) -> tuple[Path, int]:
        """The file of one layer's records and the offset of expert 0; expert e follows at e strides."""
        file = self._layers[layer]
        return file.path, file.data_offset

    def dense(self) -> dict[str, Tensor]:
        """Every dense weight by canonical name, as views of the mapped file."""
        return {name: self._dense.tensor(name) for name in dense_shapes(self.config)}

    def codebooks(self) -> dict[str, Tensor | None]:
        """For `up_proj` and `down_proj`: float32 (layers, 2**bits), or None for raw bfloat16."""
        return {
            matrix.name: None if matrix.bits == RAW_BITS else self._dense.tensor(codebook_name(matrix))
            for matrix in self.layout.matrices
        }

    def _check_headers(self) -> None:
        shape = (self.config.n_routed_experts, self.layout.stride)
        for file in self._layers:
            file.check(RECORDS, shape, ("U8",))
            if list(file.tensors) != [RECORDS] or file.data_offset % DATA_ALIGNMENT:
                raise CheckpointError(
                    f"{file.path}: the records must stand alone and begin at a multiple of {DATA_ALIGNMENT}"
                )
        for name, dense_shape in dense_shapes(self.config).items():
            self._dense.check(name, dense_shape, WEIGHT_DTYPES)
        for matrix in self.layout.matrices:
            if matrix.bits != RAW_BITS:
                self._dense.check(codebook_name(matrix), (self.config.num_layers, 1 << matrix.bits), ("F32",))


def _check_claims(directory: Path, manifest: Manifest, config: ModelConfig, layout: RecordLayout) -> None:
    """The manifest speaks of this model, this record layout and the files that lie here."""
    claimed = (manifest.layout, manifest.stride, manifest.layers, manifest.experts)
    if claimed != (layout.digest, layout.stride, config.num_layers, config.n_routed_experts):
        raise CheckpointError(
            f"{directory}: the records were packed in another layout than config.json and {MANIFEST} imply "
            f"(layout {manifest.layout}, expected {layout.digest}): pack the model again"
        )
    needed = [DENSE, "config.json", *map(layer_file, range(config.num_layers))]
    unlisted = [name for name in needed if name not in manifest.files]
    if unlisted:
        raise CheckpointError(f"{directory / MANIFEST} does not list {', '.join(unlisted)}")
    manifest.check_sizes(directory)
