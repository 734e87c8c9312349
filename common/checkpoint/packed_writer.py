"""Writes a packed checkpoint from an unpacked one: streamed, checksummed, and visible only when complete.

Records go to disk as they are packed, so memory holds a few experts whatever the model's size. The same
source and bits give the same bytes. The form on disk is described in `packed`; `packing` quantizes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint.checksum import ChecksummedFile, FileEntry
from common.checkpoint.huggingface import HuggingFaceCheckpoint
from common.checkpoint.manifest import MANIFEST, Manifest
from common.checkpoint.packed import DENSE, RECORDS, PackedCheckpoint, codebook_name, layer_file
from common.checkpoint.packing import codebook, packed_records
from common.checkpoint.partial import partial_directory
from common.checkpoint.tensor_file import DATA_ALIGNMENT, ELEMENT_BYTES, TensorInfo, data, header
from common.errors import CheckpointError, Exhausted
from common.record import RecordLayout, record_layout
from common.units import format_bytes

Progress = Callable[[int, int], None]


def pack(
    source: HuggingFaceCheckpoint,
    destination: Path,
    up_bits: int,
    down_bits: int,
    progress: Progress,
    name: str | None = None,
) -> PackedCheckpoint:
    """Pack `source` into `destination`, which must not exist; `progress` gets experts done and in all.

    `name` says in the manifest what was packed; the source directory's name by default. Raises ConfigError
    (bits), CheckpointError (weights that are not finite, the destination) or Exhausted (the disk is full),
    and then leaves nothing behind.
    """
    layout = record_layout(source.config, up_bits, down_bits)
    _check_room(source, layout, destination)
    with partial_directory(destination) as partial:
        files = {path.name: _copy(path, partial / path.name) for path in source.carried_files()}
        files[DENSE] = _write_dense(partial / DENSE, source, layout)
        files |= _write_layers(partial, source, layout, progress)
        manifest = _manifest(source, layout, files, name or source.directory.resolve().name)
        with ChecksummedFile(partial / MANIFEST) as file:
            file.write(manifest.to_json().encode())
    return PackedCheckpoint.open(destination)


def _write_layers(
    directory: Path, source: HuggingFaceCheckpoint, layout: RecordLayout, progress: Progress
) -> dict[str, FileEntry]:
    layers, experts = source.config.num_layers, source.config.n_routed_experts
    head = header({RECORDS: TensorInfo("U8", (experts, layout.stride))})
    files = {}
    # Closing the generator ends its threads, also when a write fails.
    with closing(packed_records(source, layout)) as records:
        for layer in range(layers):
            with ChecksummedFile(directory / layer_file(layer)) as file:
                file.write(head)
                for done, record in enumerate(islice(records, experts), layer * experts + 1):
                    file.write(data(record))
                    progress(done, layers * experts)
            files[layer_file(layer)] = file.entry
    return files


def _write_dense(path: Path, source: HuggingFaceCheckpoint, layout: RecordLayout) -> FileEntry:
    """The dense weights as the source stores them, and the codebooks."""
    infos, tensors = dict(source.dense_infos), dict(source.dense())
    for name, codebooks in _codebooks(layout, source.config.num_layers):
        infos[name], tensors[name] = TensorInfo("F32", tuple(codebooks.shape)), codebooks
    order = sorted(infos, key=lambda name: -ELEMENT_BYTES[infos[name].dtype])  # wide first: all stay aligned
    with ChecksummedFile(path) as file:
        file.write(header({name: infos[name] for name in order}))
        for name in order:
            # The extremes are NaN if any value is; a mask of finite values would take as much memory again.
            if not bool(torch.isfinite(torch.stack(torch.aminmax(tensors[name]))).all()):
                raise CheckpointError(f"{source.directory}: {name}: weights are not finite")
            file.write(data(tensors[name]))
    return file.entry


def _codebooks(layout: RecordLayout, layers: int) -> Iterator[tuple[str, Tensor]]:
    """One a layer, all the same: readers look it up by layer, so a pack may fit one to each."""
    for matrix in layout.matrices:
        levels = codebook(matrix.bits)
        if levels is not None:
            yield codebook_name(matrix), levels.repeat(layers, 1)


def _manifest(
    source: HuggingFaceCheckpoint, layout: RecordLayout, files: dict[str, FileEntry], name: str
) -> Manifest:
    raw = all(codebook(matrix.bits) is None for matrix in layout.matrices)
    return Manifest(
        up_bits=layout.up.bits,
        down_bits=layout.down.bits,
        stride=layout.stride,
        layout=layout.digest,
        layers=source.config.num_layers,
        experts=source.config.n_routed_experts,
        codebook="none" if raw else "converged",
        source={"name": name, "identity": source.identity},
        files=files,
    )


def _check_room(source: HuggingFaceCheckpoint, layout: RecordLayout, destination: Path) -> None:
    """Refuse at once what would fail after minutes of packing."""
    if not destination.parent.is_dir():
        raise CheckpointError(f"cannot write {destination}: {destination.parent} is not a directory")
    layer = source.config.n_routed_experts * layout.stride + DATA_ALIGNMENT
    needed = source.config.num_layers * layer + sum(info.size for info in source.dense_infos.values())
    free = shutil.disk_usage(destination.parent).free
    if free < needed:
        raise Exhausted(
            f"cannot write {destination}: no room on the disk, where {format_bytes(free)} are free and "
            f"{format_bytes(needed)} are needed"
        )


def _copy(path: Path, target: Path) -> FileEntry:
    with ChecksummedFile(target) as file:
        file.write(path.read_bytes())
    return file.entry
