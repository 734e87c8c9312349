"""Writes a packed checkpoint from any other: streamed, checksummed, and visible only when complete.

Records go to disk as they are packed, so memory holds a few experts whatever the model's size. The same
source and plan give the same bytes, so a run goes on where an interrupted one stopped (`resumable`). The
form on disk is described in `packed`; `packing` quantizes, `dense_file` writes what is not routed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

from torch import Tensor

from common.checkpoint.calibration import Calibration
from common.checkpoint.checksum import ChecksummedFile, FileEntry
from common.checkpoint.dense_file import DenseFile
from common.checkpoint.intact import intact
from common.checkpoint.manifest import MANIFEST, VERSION, Manifest
from common.checkpoint.packed import DENSE, RECORDS, PackedCheckpoint, layer_file
from common.checkpoint.packing import CONVERGED, packed_records
from common.checkpoint.plan import BitPlan, kept_codes
from common.checkpoint.resumable import ResumableDirectory, resumable_directory
from common.checkpoint.source import WeightSource, read_carried
from common.checkpoint.tensor_file import TensorInfo, data, header
from common.expert_key import ExpertKey
from common.record import RecordLayouts, record_layouts

Progress = Callable[[int, int], None]


def pack(
    source: WeightSource,
    destination: Path,
    plan: BitPlan,
    progress: Progress,
    name: str | None = None,
    details: Mapping[str, str] | None = None,
    calibration: Calibration | None = None,
    codebook: str = CONVERGED,
) -> PackedCheckpoint:
    """Pack `source` into `destination`, which must not exist; `progress` gets its bytes, done and in all.

    `name` says in the manifest what was packed, the source directory's name by default, and `details` what
    else is worth knowing of it. With a calibration, weights are rounded for the inputs that it tells of; what
    is quantized anew is by `codebook`, one of CODEBOOKS.
    Raises ConfigError (bits) or CheckpointError (weights that are not finite, a source that changes or
    differs from its checksums, the destination), and then leaves nothing behind; Exhausted (the disk is
    full), and then keeps what is finished for the next run.
    """
    layouts = record_layouts(source.config, plan.experts)
    identity = source.identity
    dense = DenseFile(source, plan, calibration, codebook)
    carried = {path.name: read_carried(path) for path in source.carried_files()}
    sizes = {name: len(content) for name, content in carried.items()} | {DENSE: dense.size}
    head = header({RECORDS: TensorInfo("U8", (source.config.n_routed_experts, layouts.stride))})
    for layer in range(source.config.num_layers):
        sizes[layer_file(layer)] = len(head) + source.config.n_routed_experts * layouts.stride
    key = _key(identity, carried, layouts, plan, calibration, codebook)
    make = partial(packed_records, source, layouts, calibration, codebook)
    with intact(source) as check_intact, resumable_directory(destination, key, sizes) as directory:
        done = _Done(source, progress, directory.finished)
        for carried_name, content in carried.items():
            directory.write(carried_name, partial(_write, content))
        directory.write(DENSE, partial(dense.write, done.count_dense))
        _write_layers(directory, source, make, head, done)
        check_intact()
        files = {name: directory.finished[name] for name in sizes}
        described = {"name": name or source.directory.resolve().name, **(details or {})}
        manifest = _manifest(source, layouts, plan, codebook, files, described)
        with ChecksummedFile(directory.path / MANIFEST) as file:
            file.write(manifest.to_json().encode())
    return PackedCheckpoint.open(destination)


class _Done:
    """How many of the source's bytes are done; those of routed experts in equal shares."""

    def __init__(self, source: WeightSource, progress: Progress, finished: dict[str, FileEntry]) -> None:
        config, self._progress = source.config, progress
        self._experts = config.num_layers * config.n_routed_experts
        self._routed_bytes = source.routed_bytes
        dense_bytes = sum(stored.size for stored in source.dense_stored.values())
        self._total = dense_bytes + self._routed_bytes
        self._dense = dense_bytes if DENSE in finished else 0
        layers = sum(layer_file(layer) in finished for layer in range(config.num_layers))
        self._experts_done = layers * config.n_routed_experts
        self._report()

    def count_dense(self, size: int) -> None:
        self._dense += size
        self._report()

    def count_expert(self) -> None:
        self._experts_done += 1
        self._report()

    def _report(self) -> None:
        routed = self._routed_bytes * self._experts_done // self._experts
        self._progress(self._dense + routed, self._total)


def _write_layers(
    directory: ResumableDirectory,
    source: WeightSource,
    pack_records: Callable[[list[ExpertKey]], Generator[Tensor, None, None]],
    head: bytes,
    done: _Done,
) -> None:
    """Every layer's file that is not finished. Threads pack ahead of the file that is being synced."""
    experts = source.config.n_routed_experts
    missing = [n for n in range(source.config.num_layers) if layer_file(n) not in directory.finished]
    keys = [ExpertKey(layer, expert) for layer in missing for expert in range(experts)]

    def fill(file: ChecksummedFile) -> None:
        file.write(head)
        for record in islice(records, experts):
            file.write(data(record))
            done.count_expert()

    # Closing the generator ends its threads, also when a write fails.
    with closing(pack_records(keys)) as records:
        for layer in missing:
            directory.write(layer_file(layer), fill)


def _write(content: bytes, file: ChecksummedFile) -> None:
    file.write(content)


def _key(
    identity: str,
    carried: dict[str, bytes],
    layouts: RecordLayouts,
    plan: BitPlan,
    calibration: Calibration | None,
    codebook: str,
) -> str:
    """Whatever decides the bytes of the files: runs of one key can share them."""
    versions = [VERSION, importlib.metadata.version("expert-serving")]
    # A source's identity need not speak of these.
    beside = {name: hashlib.sha256(content).hexdigest() for name, content in carried.items()}
    inputs = calibration and calibration.identity
    decisive = [*versions, identity, beside, layouts.digest, sorted(plan.dense.items()), inputs, codebook]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _manifest(
    source: WeightSource,
    layouts: RecordLayouts,
    plan: BitPlan,
    codebook: str,
    files: dict[str, FileEntry],
    described: dict[str, str],
) -> Manifest:
    return Manifest(
        expert_bits=[list(bits) for bits in plan.experts],
        dense_bits=plan.dense,
        stride=layouts.stride,
        layout=layouts.digest,
        layers=source.config.num_layers,
        experts=source.config.n_routed_experts,
        codebook=_codebook_origin(source, plan, codebook),
        source=described | {"identity": source.identity},
        files=files,
        synthetic=source.synthetic,
    )


def _codebook_origin(source: WeightSource, plan: BitPlan, codebook: str) -> str:
    """Whether codes were made here, carried over, both or neither."""
    kept = tuple(kept_codes(source, plan))
    return {(): "none", (False,): codebook, (True,): "source"}.get(kept, "mixed")
