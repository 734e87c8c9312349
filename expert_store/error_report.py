"""How far a checkpoint's matrices are from those it was made of: relative error and cosine, kind by kind.

Reads both checkpoints once, matrix by matrix, some rows at a time. `inspect` describes a checkpoint from its
headers and shows what is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table

from common.checkpoint import HuggingFaceCheckpoint, PackedCheckpoint, open_checkpoint
from common.checkpoint.names import dense_shapes, expert_names, expert_shapes, packable_dense
from common.checkpoint.packing import in_order, row_slices, rows_of
from common.checkpoint.source import Matrix, WeightSource
from common.errors import CheckpointError, ConfigError, ServingError
from common.expert_key import ExpertKey
from common.hlwq.matrix import PackedMatrix
from expert_store.config import DEMO
from expert_store.inspect import dense_kind
from expert_store.models import locate_model

Checkpoint = HuggingFaceCheckpoint | PackedCheckpoint


class MatrixError(NamedTuple):
    """One matrix W' against W: ||W' - W|| / ||W||, and the cosine between the two."""

    kind: str
    name: str
    bits: int | None  # of codes
    relative_error: float
    cosine: float
    size: int  # bytes of W in bfloat16


def find_source(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint that this one was packed from, if it still is where packing found it.

    That is beside it, or the demo model. Raises ConfigError with what is missing when it is not there.
    """
    if not isinstance(checkpoint, PackedCheckpoint):
        raise ConfigError(
            f"{checkpoint.directory} does not say what it was quantized from: name the unpacked original with"
            " --against SRC"
        )
    claimed = checkpoint.manifest.source
    beside = checkpoint.directory.resolve().parent / claimed["name"]
    for place in [DEMO] if claimed["name"] == DEMO else [str(beside)] if beside.is_dir() else []:
        try:
            found = open_checkpoint(locate_model(place).directory)
        except ServingError:
            continue
        if found.identity == claimed["identity"]:
            return found
    raise ConfigError(
        f"{checkpoint.directory} was packed from {claimed['name']}, which is not at {beside} as it was then: "
        "name the unpacked original with --against SRC"
    )


def measure(
    checkpoint: Checkpoint, original: Checkpoint, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """The report: whose errors, against what, and a row for each kind of matrix; `progress` gets bytes.

    Raises CheckpointError when the two are not of one shape, or a weight is not finite.
    """
    _check_same_shape(checkpoint, original)
    total = sum(2 * math.prod(shape) for shape in _shapes(checkpoint))
    done = 0
    rows: dict[str, list[MatrixError]] = {}
    with closing(in_order(_jobs(checkpoint, original))) as results:
        for errors in results:
            for error in errors:
                rows.setdefault(error.kind, []).append(error)
                done += error.size
            progress(done, total)
    return {"against": str(original.directory), "kinds": [_summary(kind, rows[kind]) for kind in rows]}


def errors_table(report: dict[str, Any]) -> Table:
    """The report's rows for people."""
    table = Table(title=f"errors against {report['against']}", title_justify="left", box=None, pad_edge=False)
    for column in ("matrices", "count", "bits", "mean error", "mean cosine", "worst error", "of"):
        table.add_column(column, justify="left" if column in ("matrices", "of") else "right", overflow="fold")
    for row in report["kinds"]:
        bits = ", ".join("-" if bits is None else str(bits) for bits in row["bits"])
        table.add_row(
            row["kind"], str(row["count"]), bits, f"{row['relative_error']:.5f}", f"{row['cosine']:.6f}",
            f"{row['worst_error']:.5f}", row["worst"],
        )  # fmt: skip
    return table


def _summary(kind: str, errors: list[MatrixError]) -> dict[str, Any]:
    worst = max(errors, key=lambda error: error.relative_error)
    return {
        "kind": kind,
        "count": len(errors),
        "bits": sorted({error.bits for error in errors}, key=lambda bits: bits or math.inf),
        "relative_error": sum(error.relative_error for error in errors) / len(errors),
        "cosine": sum(error.cosine for error in errors) / len(errors),
        "worst_error": worst.relative_error,
        "worst": worst.name.removesuffix(".weight"),
    }


def _jobs(checkpoint: Checkpoint, original: Checkpoint) -> Iterator[Callable[[], list[MatrixError]]]:
    """What to do: the experts one by one, then the dense matrices that may be packed."""
    config = checkpoint.config
    for layer in range(config.num_layers):
        for expert in range(config.n_routed_experts):
            yield partial(_expert_errors, checkpoint, original, ExpertKey(layer, expert))
    for name in packable_dense(config):
        yield partial(_dense_error, checkpoint, original, name)


def _expert_errors(checkpoint: Checkpoint, original: Checkpoint, key: ExpertKey) -> list[MatrixError]:
    names = expert_names(checkpoint.config, key)
    pairs = zip(names, checkpoint.expert(key), original.expert(key), strict=True)
    return [
        _error(f"experts.{name.split('.')[-2]}", name, matrix, reference, original)
        for name, matrix, reference in pairs
    ]


def _dense_error(checkpoint: Checkpoint, original: Checkpoint, name: str) -> list[MatrixError]:
    matrix, reference = checkpoint.dense_matrix(name), original.dense_matrix(name)
    return [_error(dense_kind(name), name, matrix, reference, original)]


def _error(kind: str, name: str, matrix: Matrix, reference: Matrix, original: Checkpoint) -> MatrixError:
    difference = norm = reference_norm = product = 0.0  # squares
    for rows in row_slices(reference):
        ours, theirs = _plain(rows_of(matrix, rows)), _plain(rows_of(reference, rows))
        difference += _dot(ours - theirs, ours - theirs)
        norm += _dot(ours, ours)
        reference_norm += _dot(theirs, theirs)
        product += _dot(ours, theirs)
    if not math.isfinite(difference):
        raise CheckpointError(f"{original.directory}: {name}, or what was packed of it, is not finite")
    bits = matrix.bits if isinstance(matrix, PackedMatrix) else None
    size = 2 * math.prod(reference.shape)
    if difference == 0:
        return MatrixError(kind, name, bits, 0.0, 1.0, size)
    if reference_norm == 0:
        raise CheckpointError(f"{original.directory}: {name} is zero here and not in what was packed of it")
    cosine = product / math.sqrt(norm * reference_norm) if norm else 0.0
    return MatrixError(kind, name, bits, math.sqrt(difference / reference_norm), cosine, size)


def _plain(matrix: Matrix) -> torch.Tensor:
    return matrix.decode() if isinstance(matrix, PackedMatrix) else matrix.float()


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


def _shapes(checkpoint: WeightSource) -> list[tuple[int, ...]]:
    """Of every matrix that is measured."""
    config = checkpoint.config
    dense = dense_shapes(config)
    experts = config.num_layers * config.n_routed_experts
    return [dense[name] for name in packable_dense(config)] + [*expert_shapes(config)] * experts


def _check_same_shape(checkpoint: Checkpoint, original: Checkpoint) -> None:
    ours, theirs = checkpoint.config, original.config
    if ours.pattern != theirs.pattern or _shapes(checkpoint) != _shapes(original):
        raise CheckpointError(
            f"{original.directory} is another model than {checkpoint.directory}: blocks or shapes differ"
        )
