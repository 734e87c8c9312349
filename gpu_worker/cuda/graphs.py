"""Decode steps captured in CUDA graphs: one for each number of sequences, replayed without the host's help.

A step in eager mode is a few hundred launches that the host issues one by one; a graph is one. Both are the
same kernels in the same order, so they give the same bits. Not done here: what a step computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16)  # sequences a graph is made for; fewer run in the next larger one, filled up

# tokens, places (b,) int64 to logits (b, vocab) float32
Step = Callable[[Tensor, Tensor], Tensor]


class CapturedSteps:
    """Graphs of `step` for up to `most` sequences; what fills one up works at `spare`, nobody's place."""

    def __init__(self, step: Step, most: int, spare: int, device: torch.device) -> None:
        started = time.monotonic()
        self._spare = spare
        self._graphs: dict[int, _Captured] = {}
        pool = None
        # From the largest down: the smaller ones then reuse its memory.
        for size in sorted((s for s in SIZES if s < 2 * most), reverse=True):
            captured = _Captured(step, size, spare, device, pool)
            pool = captured.graph.pool()
            self._graphs[size] = captured
        log.info(
            "captured decode steps of %s sequences in %.1f s",
            sorted(self._graphs),
            time.monotonic() - started,
        )

    def __call__(self, tokens: list[int], places: list[int]) -> Tensor:
        """Logits (b, vocab) float32, valid until the next step."""
        size = min(s for s in self._graphs if s >= len(tokens))
        return self._graphs[size].replay(tokens, places, self._spare)[: len(tokens)]


class _Captured:
    """One graph, and the tensors that it reads and writes."""

    def __init__(self, step: Step, size: int, spare: int, device: torch.device, pool: Any) -> None:
        self._inputs = torch.zeros(2, size, dtype=torch.int64, device=device)
        self._inputs[1] = spare
        # Written by the host, read by a copy that the stream orders before the replay.
        self._staged = torch.zeros(2, size, dtype=torch.int64).pin_memory()
        tokens, places = self._inputs
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(
            stream
        ):  # compiles kernels and makes cuBLAS's workspaces, outside of the capture
            step(tokens, places)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self._logits = step(tokens, places)

    def replay(self, tokens: list[int], places: list[int], spare: int) -> Tensor:
        filling = self._staged.shape[1] - len(tokens)
        self._staged[0] = torch.tensor(tokens + [0] * filling)
        self._staged[1] = torch.tensor(places + [spare] * filling)
        self._inputs.copy_(self._staged, non_blocking=True)
        self.graph.replay()
        return self._logits
