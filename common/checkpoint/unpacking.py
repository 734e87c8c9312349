"""Writes any checkpoint as a Hugging Face directory: plain, or in a published HLWQ layout.

Streamed, several weights at a time, and visible only when complete. What becomes of a weight is known to
`unpack_layouts`, how files are made of weights to `unpack_shards`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from common.checkpoint.intact import intact
from common.checkpoint.names import expert_names
from common.checkpoint.partial import check_room, partial_directory, writing
from common.checkpoint.polar_config import POLAR_CONFIG
from common.checkpoint.source import SYNTHETIC, Matrix, Stored, WeightSource, read_carried
from common.checkpoint.unpack_layouts import BF16, LAYOUTS, matrix_key, polar_entry
from common.checkpoint.unpack_shards import (
    LARGEST_SHARD,
    Group,
    Shard,
    Weight,
    make_shards,
    write_index,
    write_json,
)
from common.errors import ConfigError
from common.expert_key import ExpertKey
from common.hlwq.planes import BLOCK, RAW_BITS

Progress = Callable[[int, int], None]
CONFIG = "config.json"
# Keys of a config that speak of what does not travel: the source's own layout, and Python files beside it.
_LEFT_BEHIND = ("quantization_config", "auto_map")


def unpack(
    source: WeightSource,
    destination: Path,
    layout: str,
    progress: Progress,
    largest_shard: int = LARGEST_SHARD,
) -> list[Shard]:
    """Write `source` to `destination`, which must not exist, in one of LAYOUTS; returns the files of weights.

    `progress` gets bytes done and in all. Raises ConfigError for a weight that the layout cannot carry,
    CheckpointError for damaged codes or a destination that cannot be made, Exhausted when the disk is full,
    and then leaves nothing behind. Plain weights come out as they are.
    """
    shards = make_shards(_groups(source, layout), largest_shard)
    total = sum(group.size for shard in shards for group in shard.groups)
    check_room(destination, total)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    with intact(source) as check_intact, partial_directory(destination) as partial_copy:
        count(0)
        _carry(source, partial_copy)
        if layout != BF16:
            write_json(partial_copy / POLAR_CONFIG, _polar_config(source, layout))
        for shard in shards:
            shard.write(partial_copy, count)
        write_index(partial_copy, shards)
        check_intact()
    return shards


def _groups(source: WeightSource, layout: str) -> Iterator[Group]:
    """All weights: the dense ones in the order of the forward pass, then experts layer by layer."""
    for name, stored in source.dense_stored.items():
        yield Group([_weight(source, layout, name, stored)], partial(_read_dense, source, name))
    for key in _expert_keys(source):
        names, both = expert_names(source.config, key), source.expert_stored(key)
        weights = [_weight(source, layout, name, stored) for name, stored in zip(names, both, strict=True)]
        yield Group(weights, partial(source.expert, key))


def _weight(source: WeightSource, layout: str, name: str, stored: Stored) -> Weight:
    label = f"{source.directory}: {name}"
    try:
        return Weight(label, LAYOUTS[layout](name, stored))
    except ConfigError as error:
        raise ConfigError(f"{label} {error}") from None


def _read_dense(source: WeightSource, name: str) -> tuple[Matrix]:
    return (source.dense_matrix(name),)


def _expert_keys(source: WeightSource) -> Iterator[ExpertKey]:
    for layer in range(source.config.num_layers):
        for expert in range(source.config.n_routed_experts):
            yield ExpertKey(layer, expert)


def _carry(source: WeightSource, directory: Path) -> None:
    """Config, tokenizer and chat template."""
    for path in source.carried_files():
        content = read_carried(path)
        with writing(directory / path.name), (directory / path.name).open("xb") as file:
            file.write(_config(content, source.synthetic) if path.name == CONFIG else content)
            file.flush()
            os.fsync(file.fileno())


def _config(content: bytes, synthetic: bool) -> bytes:
    """The config as it is, but for what speaks of the source alone, and with a mark on random weights."""
    before = json.loads(content)
    config = {name: value for name, value in before.items() if name not in _LEFT_BEHIND}
    if synthetic:
        config[SYNTHETIC] = True
    return content if config == before else (json.dumps(config, indent=2) + "\n").encode()


def _polar_config(source: WeightSource, layout: str) -> dict[str, object]:
    stored = dict(source.dense_stored)
    for key in _expert_keys(source):
        stored.update(zip(expert_names(source.config, key), source.expert_stored(key), strict=True))
    layers = {
        matrix_key(name): polar_entry(matrix)
        for name, matrix in stored.items()
        if matrix.bits not in (None, RAW_BITS)
    }
    return {"format": layout, "block_size": BLOCK, "layers": layers}
