"""Copies of records from the arena to places in device memory, which the host asks for.

One stream of its own, so that the link works while other streams compute; who fills a place says what must
have ended before, and who reads it waits for what `done` gives. Not done here: choosing places, counting, and
the fetch of steps that the device drives (`device_slots`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.arena import MappedArena
from common.expert_key import ExpertKey
from gpu_worker.cuda.driver import copy_all
from gpu_worker.cuda.host_memory import RegisteredArena
from gpu_worker.slots.fetch import Fetcher, Wanted


def now(device: torch.device) -> torch.cuda.Event | None:
    """What has been launched on the current stream so far; None on a CPU, where it has ended."""
    return torch.cuda.current_stream().record_event() if device.type == "cuda" else None


def wait_for(event: torch.cuda.Event | None) -> None:
    """The current stream goes on once `event` has come; the host goes on at once."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


class RecordCopies:
    """Owns the stream of copies, and the registration of the arena that they read.

    Frames of a store that keeps every expert in RAM are never reused: copies are left to themselves, and the
    arena is read on after its store is gone. Frames of any other store may be reused: the host waits for the
    copy, and looks whether the frame was left alone meanwhile, before it is released.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        arena: RegisteredArena,
        full: bool,
        device: torch.device,
        one_by_one: bool = False,
    ) -> None:
        """`full`: every expert is READY in `arena`, for good; `one_by_one`: each alone, and waited for."""
        self.full, self.one_by_one = full, one_by_one
        self.arena = arena
        self._fetcher, self._device = fetcher, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(self, wanted: Sequence[Wanted]) -> set[ExpertKey]:
        """Have each record copied to its place; returns the experts that had to be staged first.

        Raises what `Fetcher.stage` raises.
        """
        groups = [[item] for item in wanted] if self.one_by_one else [wanted]
        if self.full:
            for group in groups:
                read = self._read(self.arena.mapped, group)
                assert len(read) == len(group), "a record of a full arena is not ready"
            return set()
        return set().union(*(self._fetcher.fetch(group, self._read) for group in groups))

    def after(self, event: torch.cuda.Event | None) -> None:
        """Copies from now on wait for `event`."""
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    def done(self) -> torch.cuda.Event | None:
        """The end of all copies so far."""
        return None if self._stream is None else self._stream.record_event()

    def close(self) -> None:
        """Once no kernel reads the arena any more."""
        if self._stream is not None:
            torch.cuda.synchronize(self._device)
        self.arena.close()

    def _read(self, arena: MappedArena, wanted: Sequence[Wanted]) -> set[ExpertKey]:
        """Copy those that are READY; returns which."""
        self.arena = self.arena.followed_by(arena)  # all copies from the former have been waited for
        keys, places = [key for key, _ in wanted], [place for _, place in wanted]

        def copy(ready: list[int], frames: list[Tensor]) -> None:
            self._copy([(frame, places[index]) for index, frame in zip(ready, frames, strict=True)])

        absent = set(arena.use(keys, copy))
        return {key for index, key in enumerate(keys) if index not in absent}

    def _copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        if self._stream is None:
            for frame, place in pairs:
                place.copy_(frame)
            return
        copy_all(pairs, self._stream)
        if self.one_by_one or not self.full:
            self._stream.synchronize()
