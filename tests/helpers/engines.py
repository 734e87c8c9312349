"""Engines in this process over an arena in this process: real objects, no sockets, no second process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch

from common.addresses import Address
from common.arena import ArenaShape, Entry, MappedArena, OwnedArena, State
from common.checkpoint.packed import PackedCheckpoint
from common.expert_key import ExpertKey
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.loading import ServedModel, load_model
from gpu_worker.slots.fetch import Fetcher, Take
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
    config = checkpoint.config
    keys = [ExpertKey(n, e) for n in range(config.num_layers) for e in range(config.n_routed_experts)]
    arena = _arena(checkpoint, len(keys))
    for frame, key in enumerate(keys):
        arena.frames[frame] = _record(checkpoint, key)
        arena.publish(key, Entry(State.READY, frame, 1))
    try:
        yield FixedLink(_attachment(checkpoint, arena, all_fit=True))
    finally:
        arena.close()


class ScarceStore(Fetcher):
    """A store of a few frames and its fetcher in one: whatever is staged takes the oldest frame."""

    def __init__(self, checkpoint: PackedCheckpoint, frames: int) -> None:
        self._owned, self._checkpoint = _arena(checkpoint, frames), checkpoint
        self._held: list[ExpertKey] = []  # oldest first
        self.staged = 0
        super().__init__(FixedLink(_attachment(checkpoint, self._owned, all_fit=False)))  # type: ignore[arg-type]

    def stage(self, keys: Iterable[ExpertKey], take: Take) -> None:
        for key in keys:
            frame, arena = self.staged % self._owned.shape.frames, self._owned
            if self.staged >= arena.shape.frames:
                arena.publish(self._held.pop(0), Entry(State.ABSENT, 0, self.staged))
            arena.frames[frame] = _record(self._checkpoint, key)
            self.staged += 1
            self._held.append(key)
            arena.publish(key, Entry(State.READY, frame, self.staged))
            assert take(self.arena, key)

    def hint(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        return [key for key in keys if not self.arena.is_ready(key)]

    def close(self) -> None:
        self._owned.close()


def _arena(checkpoint: PackedCheckpoint, frames: int) -> OwnedArena:
    config, layout = checkpoint.config, checkpoint.layout
    shape = (layout.digest, config.num_layers, config.n_routed_experts, frames, layout.stride)
    arena = OwnedArena(ArenaShape(*shape))
    arena.commit(list(range(frames)))
    return arena


def _record(checkpoint: PackedCheckpoint, key: ExpertKey) -> torch.Tensor:
    path, offset = checkpoint.records_file(key.layer)
    stride = checkpoint.layout.stride
    with path.open("rb") as file:
        file.seek(offset + key.expert * stride)
        return torch.frombuffer(bytearray(file.read(stride)), dtype=torch.uint8)


def _attachment(checkpoint: PackedCheckpoint, arena: OwnedArena, all_fit: bool) -> Attachment:
    return Attachment(
        lease_id=1,
        lease_ttl=3.0,
        arena=MappedArena(arena.path, checkpoint.layout.digest),
        data_endpoint="ipc:///nonexistent",
        checkpoint=checkpoint.directory,
        fingerprint=checkpoint.fingerprint,
        all_fit=all_fit,
    )


def load(link: FixedLink, **options: object) -> ServedModel:
    """A model loaded as the worker does it, on the CPU."""
    config = WorkerConfig(store=NOWHERE, listen=NOWHERE, device="cpu", **options)  # type: ignore[arg-type]
    return load_model(config, link.attachment, link)  # type: ignore[arg-type]


def prompt_logits(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """Logits after every token of a prompt: (len(tokens), vocab_size)."""
    place = engine.take_place()
    pieces = [engine.logits(engine.prefill(place, chunk)) for chunk in chunks(engine, tokens)]
    engine.give_place(place)
    return torch.cat(pieces)


def chunks(engine: Engine, tokens: list[int]) -> list[list[int]]:
    """A prompt as the worker cuts it."""
    cuts = [0, *(cut for cut in engine.cut_law.cuts(tokens) if cut < len(tokens)), len(tokens)]
    return [tokens[start:end] for start, end in pairwise(cuts)]


def greedy(engine: Engine, tokens: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """`count` greedy tokens after a prompt, and the logits each was chosen from."""
    place = engine.take_place()
    for chunk in chunks(engine, tokens):
        hidden = engine.prefill(place, chunk)
    logits = [engine.logits(hidden[-1:])[0]]
    output = [int(logits[0].argmax())]
    while len(output) < count:
        # A copy: captured steps write their logits to the same place again.
        logits.append(engine.decode([place], [output[-1]])[0].clone())
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
