"""Engines in this process over an arena in this process: real objects, no sockets, no second process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from common.addresses import Address
from common.arena import ArenaShape, Entry, MappedArena, OwnedArena, State
from common.checkpoint.packed import PackedCheckpoint
from common.expert_key import ExpertKey
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import PREFILL_CHUNK, Engine
from gpu_worker.loading import ServedModel, load_model
from gpu_worker.store_link import Attachment

NOWHERE = Address("unix:/nonexistent.sock")


class FixedLink:
    """A link to a store that never goes away and never has to be asked."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = self.last_attachment = attachment

    def wait_attached(self, timeout: float) -> Attachment:
        return self.attachment

    def check_interrupted(self) -> None:
        """Nobody stops these engines."""

    def give_up(self, attachment: Attachment) -> None:
        raise AssertionError("the lease of a fixed link cannot end")


@contextmanager
def full_arena(checkpoint: PackedCheckpoint) -> Iterator[FixedLink]:
    """Every record READY, as a store leaves it once all are loaded."""
    config, layout = checkpoint.config, checkpoint.layout
    keys = [ExpertKey(n, e) for n in range(config.num_layers) for e in range(config.n_routed_experts)]
    arena = OwnedArena(
        ArenaShape(layout.digest, config.num_layers, config.n_routed_experts, len(keys), layout.stride)
    )
    arena.commit(list(range(len(keys))))
    for frame, key in enumerate(keys):
        path, offset = checkpoint.records_file(key.layer)
        with path.open("rb") as file:
            file.seek(offset + key.expert * layout.stride)
            arena.frames[frame] = torch.frombuffer(bytearray(file.read(layout.stride)), dtype=torch.uint8)
        arena.publish(key, Entry(State.READY, frame, 1))
    try:
        yield FixedLink(
            Attachment(
                lease_id=1,
                lease_ttl=3.0,
                arena=MappedArena(arena.path, layout.digest),
                data_endpoint="ipc:///nonexistent",
                checkpoint=checkpoint.directory,
                fingerprint=checkpoint.fingerprint,
                all_fit=True,
            )
        )
    finally:
        arena.close()


def load(link: FixedLink, **options: object) -> ServedModel:
    """A model loaded as the worker does it, on the CPU."""
    config = WorkerConfig(store=NOWHERE, listen=NOWHERE, device="cpu", **options)  # type: ignore[arg-type]
    return load_model(config, link.attachment, link)  # type: ignore[arg-type]


def prompt_logits(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """Logits after every token of a prompt: (len(tokens), vocab_size)."""
    place = engine.take_place()
    pieces = [
        engine.logits(engine.prefill(place, tokens[start : start + PREFILL_CHUNK]))
        for start in range(0, len(tokens), PREFILL_CHUNK)
    ]
    engine.give_place(place)
    return torch.cat(pieces)


def greedy(engine: Engine, tokens: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """`count` greedy tokens after a prompt, and the logits each was chosen from."""
    place = engine.take_place()
    for start in range(0, len(tokens), PREFILL_CHUNK):
        hidden = engine.prefill(place, tokens[start : start + PREFILL_CHUNK])
    logits = [engine.logits(hidden[-1:])[0]]
    output = [int(logits[0].argmax())]
    while len(output) < count:
        logits.append(engine.decode([place], [output[-1]])[0])
        output.append(int(logits[-1].argmax()))
    engine.give_place(place)
    return output, torch.stack(logits)


def packed(source: Path, destination: Path, bits: int) -> PackedCheckpoint:
    """`source` packed at `bits`, reused if it is there already."""
    from tests.helpers.models import pack_model

    return (
        PackedCheckpoint.open(destination)
        if destination.exists()
        else pack_model(source, destination, bits, bits)
    )
