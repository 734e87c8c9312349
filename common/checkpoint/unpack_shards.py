"""Shards of a Hugging Face directory, written by several threads: which tensor lies where, and the index.

The form of every tensor is known before its data, so headers come first and each weight's data are written to
their places as soon as they are computed: memory holds a few weights whatever the model's size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from common.checkpoint.packing import in_order
from common.checkpoint.partial import writing
from common.checkpoint.shards import INDEX, SINGLE
from common.checkpoint.source import Matrix
from common.checkpoint.tensor_file import ELEMENT_BYTES, TensorInfo, data, header
from common.checkpoint.unpack_layouts import Part
from common.errors import ConfigError

LARGEST_SHARD = 5_000_000_000  # bytes of tensors, as Hugging Face's own files have


class Weight(NamedTuple):
    """One weight: what messages call it, and its tensors."""

    label: str
    parts: list[Part]


class Group(NamedTuple):
    """Weights that are read together and lie in one shard: a dense weight, or an expert's two."""

    weights: list[Weight]
    read: Callable[[], tuple[Matrix, ...]]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(part.info.size for weight in self.weights for part in weight.parts)


@dataclass(frozen=True)
class Shard:
    """One file and what lies in it."""

    file_name: str
    groups: list[Group]

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Its tensors in the order of their data: those of wide elements first, so that all are aligned."""
        parts = [part for group in self.groups for weight in group.weights for part in weight.parts]
        parts.sort(key=lambda part: -ELEMENT_BYTES[part.info.dtype])
        return {part.name: part.info for part in parts}

    def write(self, directory: Path, count: Callable[[int], None]) -> None:
        """Write the file and sync it; `count` is told the bytes of each group of weights.

        Raises ConfigError for a weight that the layout cannot carry, and names it.
        """
        head = header(self.tensors)
        offsets, end = {}, len(head)
        for name, info in self.tensors.items():
            offsets[name] = end
            end += info.size
        path = directory / self.file_name
        with writing(path), path.open("xb") as file:
            descriptor = file.fileno()
            _write_at(descriptor, memoryview(head), 0)
            jobs = (partial(_write_group, descriptor, group, offsets) for group in self.groups)
            # Closing the generator waits for its threads, also when one of them fails.
            with closing(in_order(jobs)) as sizes:
                for size in sizes:
                    count(size)
            os.fsync(descriptor)


def make_shards(groups: Iterable[Group], largest: int) -> list[Shard]:
    """`groups` in their order, in files of at most `largest` bytes; a group that is larger gets its own."""
    runs: list[list[Group]] = []
    room = 0
    for group in groups:
        if group.size > room:
            runs.append([])
            room = largest
        runs[-1].append(group)
        room -= group.size
    if len(runs) == 1:
        return [Shard(SINGLE, runs[0])]
    return [
        Shard(f"model-{number:05d}-of-{len(runs):05d}.safetensors", run) for number, run in enumerate(runs, 1)
    ]


def write_index(directory: Path, shards: list[Shard]) -> None:
    """The index that says which file holds which tensor; a single file needs none."""
    if len(shards) == 1:
        return
    total = sum(group.size for shard in shards for group in shard.groups)
    weight_map = {name: shard.file_name for shard in shards for name in shard.tensors}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: object) -> None:
    """A small file, on disk when this returns."""
    with writing(path), path.open("x") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write_group(descriptor: int, group: Group, offsets: dict[str, int]) -> int:
    """Write the tensors of a group to their places; returns how many bytes they are."""
    for weight, matrix in zip(group.weights, group.read(), strict=True):
        try:
            for part in weight.parts:
                _write_part(descriptor, part, matrix, offsets[part.name])
        except ConfigError as error:
            raise ConfigError(f"{weight.label} {error}") from None
    return group.size


def _write_part(descriptor: int, part: Part, matrix: Matrix, offset: int) -> None:
    end = offset + part.info.size
    for run in part.runs(matrix):
        raw = data(run)
        _write_at(descriptor, raw, offset)
        offset += raw.nbytes
    assert offset == end, f"{part.name} is not as large as the header says"


def _write_at(descriptor: int, raw: memoryview, offset: int) -> None:
    """All of `raw` at `offset`; one call may write less."""
    while raw:
        written = os.pwrite(descriptor, raw, offset)
        raw, offset = raw[written:], offset + written
