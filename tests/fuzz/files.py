"""Checkpoints of which a file is damaged: read whole, or refused in words, and always if a checksum tells.

Everything that is done to a checkpoint is done in this process: what `inspect` does, reading each dense
matrix and each expert, and what `verify` does with a packed one. Each case has a time limit.
"""

from __future__ import annotations

import json
import random
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from common.checkpoint import PackedCheckpoint, open_checkpoint
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.errors import CheckpointError, ServingError
from common.expert_key import ExpertKey
from expert_store.inspect import as_table, describe
from tests.fuzz.mutate import json_bytes, mutated, mutated_json
from tests.fuzz.tally import Tally
from tests.helpers.models import make_hf_model
from tests.helpers.published import polar_engine, published_model, q5

LIMIT = 20  # seconds a case; one takes milliseconds
_SHAPE: dict[str, Any] = {"hybrid_override_pattern": "ME*-", "n_routed_experts": 4, "vocab_size": 64}


@dataclass(frozen=True)
class Victim:
    """A checkpoint that is whole between one case and the next."""

    directory: Path
    files: dict[str, bytes]

    @classmethod
    def of(cls, directory: Path) -> Victim:
        return cls(directory, {path.name: path.read_bytes() for path in sorted(directory.iterdir())})


def make_victims(directory: Path) -> list[Victim]:
    """One of each kind: packed, plain, and two of the published layouts."""
    plain = make_hf_model(directory / "plain", **_SHAPE)
    source = open_checkpoint(plain)
    pack(source, directory / "packed", make_plan(source, dense_bits=5), lambda done, total: None)
    published_model(plain, 5).write_shards(directory / "q5", q5)
    published_model(plain, 5).write(directory / "polar", polar_engine)
    return [Victim.of(directory / name) for name in ("packed", "packed", "plain", "q5", "polar")]


def run(tally: Tally, numbers: range, victims: list[Victim]) -> None:
    for number in numbers:
        draw = tally.draw(number)
        victim = draw.choice(victims)
        name = draw.choice(list(victim.files))
        damaged = _damaged(draw, name, victim.files[name])
        path = victim.directory / name
        path.write_bytes(damaged)
        try:
            with _time_limit():
                _read_all(victim.directory)
        except ServingError as error:
            tally.outcome(type(error).__name__)
        except BaseException as error:  # whatever else there is, is a fault
            if isinstance(error, KeyboardInterrupt):
                raise
            tally.fault(number, f"{path}: {''.join(traceback.format_exception(error, limit=-5))}")
        else:
            if name in _covered(victim) and damaged != victim.files[name]:
                tally.fault(number, f"{path} is damaged, and nobody says so")
            tally.outcome("read")
        finally:
            path.write_bytes(victim.files[name])


def _read_all(directory: Path) -> None:
    """All that any command does with a checkpoint, but for writing another."""
    as_table(describe(directory))
    checkpoint = open_checkpoint(directory)
    for name in checkpoint.dense_stored:
        checkpoint.dense_matrix(name)
    for layer in range(checkpoint.config.num_layers):
        for expert in range(checkpoint.config.n_routed_experts):
            checkpoint.expert(ExpertKey(layer, expert))
    if isinstance(checkpoint, PackedCheckpoint):
        wrong = checkpoint.manifest.damaged_files(directory, lambda done, total: None)
        if wrong:
            raise CheckpointError("; ".join(wrong))


def _covered(victim: Victim) -> set[str]:
    """Files whose every byte has a checksum."""
    manifest = victim.files.get("packed.json")
    return set(json.loads(manifest)["files"]) if manifest else set()


def _damaged(draw: random.Random, name: str, data: bytes) -> bytes:
    way = draw.random()
    if name.endswith(".json"):
        return json_bytes(draw, json.loads(data)) if way < 0.8 else mutated(draw, data)
    if not name.endswith(".safetensors") or way < 0.3:
        return mutated(draw, data)
    size = int.from_bytes(data[:8], "little")
    head, rest = data[8 : 8 + size], data[8 + size :]
    if way < 0.5:  # a header that is one, and speaks of something else
        head = json.dumps(mutated_json(draw, json.loads(head)), allow_nan=True).encode(errors="surrogatepass")
        head = head.ljust(size) if draw.random() < 0.5 else head
    elif way < 0.7:
        head = mutated(draw, head)
    elif way < 0.8:
        return mutated(draw, data[:8]) + data[8:]
    else:
        rest = mutated(draw, rest)
    return len(head).to_bytes(8, "little") + head + rest


@contextmanager
def _time_limit() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not read within {LIMIT} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
