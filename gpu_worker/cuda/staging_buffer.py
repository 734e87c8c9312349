"""Records on their way through device memory: for prompts, whose experts must not push out those of decode.

Two halves, one of which the copy engine fills while experts are computed from the other. Not done here: which
records, and computing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpu_worker.cuda.driver import copy_all


class StagingBuffer:
    """Owns both halves and the stream that fills them.

        EMPTY --fill--> FILLING --(the current stream waits)--> IN USE --(the copies' stream waits)--> EMPTY

    On the CPU, where tests run, copies are done when they are made and nothing has to wait.
    """

    def __init__(self, records: int, stride: int, device: torch.device) -> None:
        """`records` in each half."""
        self._halves = torch.empty(2, records, stride, dtype=torch.uint8, device=device)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        return self._halves.nbytes

    def waves(self, frames: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The records of `frames` (stride,) in order, some at a time; each valid until the next is taken."""
        size = self._halves.shape[1]
        groups = [frames[start : start + size] for start in range(0, len(frames), size)]
        filled = [self._fill(0, groups[0])] if groups else []
        for number, group in enumerate(groups):
            if number + 1 < len(groups):
                # Its half was last read by kernels that have been launched: the copies wait for these.
                filled.append(self._fill((number + 1) % 2, groups[number + 1]))
            if (done := filled[number]) is not None:
                torch.cuda.current_stream().wait_event(done)
            yield list(self._halves[number % 2, : len(group)])

    def _fill(self, half: int, frames: Sequence[Tensor]) -> torch.cuda.Event | None:
        pairs = list(zip(frames, self._halves[half], strict=False))
        if self._copies is None:
            for frame, record in pairs:
                record.copy_(frame)
            return None
        self._copies.wait_stream(torch.cuda.current_stream())
        copy_all(pairs, self._copies)
        return self._copies.record_event()
