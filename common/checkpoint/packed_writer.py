"""Writes a packed checkpoint from any other: streamed, checksummed, and visible only when complete.

Records go to disk as they are packed, so memory holds a few experts whatever the model's size. The same
source and plan give the same bytes. The form on disk is described in `packed`; `packing` quantizes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint.checksum import ChecksummedFile, FileEntry
from common.checkpoint.manifest import MANIFEST, Manifest
from common.checkpoint.packed import (
    DENSE,
    RECORDS,
    PackedCheckpoint,
    dense_layouts,
    layer_file,
    packed_name,
)
from common.checkpoint.packing import packed, packed_records
from common.checkpoint.partial import check_room, partial_directory
from common.checkpoint.plan import BitPlan
from common.checkpoint.source import Matrix, WeightSource
from common.checkpoint.tensor_file import DATA_ALIGNMENT, ELEMENT_BYTES, TensorInfo, data, header
from common.errors import CheckpointError
from common.expert_key import ExpertKey
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import RAW_BITS
from common.record import MatrixLayout, RecordLayouts, record_layouts

Progress = Callable[[int, int], None]


def pack(
    source: WeightSource, destination: Path, plan: BitPlan, progress: Progress, name: str | None = None
) -> PackedCheckpoint:
    """Pack `source` into `destination`, which must not exist; `progress` gets experts done and in all.

    `name` says in the manifest what was packed; the source directory's name by default. Raises ConfigError
    (bits), CheckpointError (weights that are not finite, the destination) or Exhausted (the disk is full),
    and then leaves nothing behind.
    """
    layouts = record_layouts(source.config, plan.experts)
    check_room(destination, _size(source, layouts, plan))
    with partial_directory(destination) as partial:
        files = {path.name: _copy(path, partial / path.name) for path in source.carried_files()}
        files[DENSE] = _write_dense(partial / DENSE, source, plan)
        files |= _write_layers(partial, source, layouts, progress)
        manifest = _manifest(source, layouts, plan, files, name or source.directory.resolve().name)
        with ChecksummedFile(partial / MANIFEST) as file:
            file.write(manifest.to_json().encode())
    return PackedCheckpoint.open(destination)


def _write_layers(
    directory: Path, source: WeightSource, layouts: RecordLayouts, progress: Progress
) -> dict[str, FileEntry]:
    layers, experts = source.config.num_layers, source.config.n_routed_experts
    head = header({RECORDS: TensorInfo("U8", (experts, layouts.stride))})
    files = {}
    for layer in range(layers):
        keys = [ExpertKey(layer, expert) for expert in range(experts)]
        # Closing the generator ends its threads, also when a write fails.
        with (
            closing(packed_records(source, layouts, keys)) as records,
            ChecksummedFile(directory / layer_file(layer)) as file,
        ):
            file.write(head)
            for done, record in enumerate(records, layer * experts + 1):
                file.write(data(record))
                progress(done, layers * experts)
        files[layer_file(layer)] = file.entry
    return files


def _write_dense(path: Path, source: WeightSource, plan: BitPlan) -> FileEntry:
    """The dense weights as the source stores them, but for the matrices that the plan packs."""
    layouts = dense_layouts(source.config, plan.dense)
    infos = {}
    for name, stored in source.dense_stored.items():
        if name in layouts:
            infos[name] = TensorInfo("U8", (layouts[name][1],))
        else:
            infos[name] = TensorInfo(stored.dtype, stored.shape)
    order = sorted(infos, key=lambda name: -ELEMENT_BYTES[infos[name].dtype])  # wide first: all stay aligned
    with ChecksummedFile(path) as file:
        file.write(header({packed_name(name) if name in layouts else name: infos[name] for name in order}))
        for name in order:
            try:
                file.write(data(_dense_tensor(source.dense_matrix(name), layouts.get(name))))
            except CheckpointError as error:
                raise CheckpointError(f"{source.directory}: {name}: {error}") from None
    return file.entry


def _dense_tensor(matrix: Matrix, layout: tuple[MatrixLayout, int] | None) -> Tensor:
    """What is written of a dense weight: its packed bytes, or its values."""
    if layout is not None:
        run = torch.zeros(layout[1], dtype=torch.uint8)
        layout[0].store(packed(matrix, layout[0].bits), run)
        return run
    if isinstance(matrix, PackedMatrix):
        return matrix.decode(torch.bfloat16)
    # The extremes are NaN if any value is; a mask of finite values would take as much memory again.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(matrix))).all()):
        raise CheckpointError("weights are not finite")
    return matrix


def _manifest(
    source: WeightSource, layouts: RecordLayouts, plan: BitPlan, files: dict[str, FileEntry], name: str
) -> Manifest:
    return Manifest(
        expert_bits=[list(bits) for bits in plan.experts],
        dense_bits=plan.dense,
        stride=layouts.stride,
        layout=layouts.digest,
        layers=source.config.num_layers,
        experts=source.config.n_routed_experts,
        codebook=_codebook_origin(source, plan),
        source={"name": name, "identity": source.identity},
        files=files,
        synthetic=source.synthetic,
    )


def _codebook_origin(source: WeightSource, plan: BitPlan) -> str:
    """Whether codes were made here, carried over, both or neither."""
    stored = source.dense_stored
    pairs = [(bits, stored[name].bits) for name, bits in plan.dense.items()]
    for bits, before in zip(plan.experts, source.expert_bits, strict=True):
        pairs += zip(bits, before or (None, None), strict=True)
    kept = {bits == before for bits, before in pairs if bits != RAW_BITS}
    return {(): "none", (False,): "converged", (True,): "source"}.get(tuple(kept), "mixed")


def _size(source: WeightSource, layouts: RecordLayouts, plan: BitPlan) -> int:
    """Bytes of all weights as they will be written."""
    layer = source.config.n_routed_experts * layouts.stride + DATA_ALIGNMENT
    packed_sizes = {name: size for name, (_, size) in dense_layouts(source.config, plan.dense).items()}
    dense = sum(
        packed_sizes.get(name) or TensorInfo(stored.dtype, stored.shape).size
        for name, stored in source.dense_stored.items()
    )
    return source.config.num_layers * layer + dense


def _copy(path: Path, target: Path) -> FileEntry:
    with ChecksummedFile(target) as file:
        file.write(path.read_bytes())
    return file.entry
