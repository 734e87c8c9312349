"""Decode steps captured in CUDA graphs: one for each number of sequences, replayed without the host's help.

A step in eager mode is a few hundred launches that the host issues one by one; a graph is one. Both are the
same kernels in the same order, so they give the same bits. Not done here: what a step computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Decoded(NamedTuple):
    """What comes of a step for b sequences."""

    logits: Tensor  # (b, vocab) float32
    best: Tensor  # (b, 2) float64: the most probable token and its log-probability


# tokens, places (b,) int64
Step = Callable[[Tensor, Tensor], Decoded]


class CapturedSteps:
    """A graph of `step` for each of some numbers of sequences.

    Capturing runs the step at the places 0, 1, ..., which must be free and are to be reset afterwards.
    """

    def __init__(self, step: Step, sizes: Sequence[int], device: torch.device) -> None:
        started = time.monotonic()
        self._graphs: dict[int, _Captured] = {}
        memory = None
        stream = torch.cuda.Stream(device) if sizes else None  # one for all: cuBLAS has a workspace for each
        for size in sorted(sizes, reverse=True):  # the largest first: the others reuse its memory
            captured = self._graphs[size] = _Captured(step, size, stream, memory)
            memory = captured.graph.pool()
        if sizes:
            took = time.monotonic() - started
            log.info("captured the decode steps of %s sequences in %.1f s", ", ".join(map(str, sizes)), took)

    def __contains__(self, size: int) -> bool:
        return size in self._graphs

    def __call__(self, tokens: Sequence[int], places: Sequence[int]) -> Decoded:
        """Valid until the next step."""
        return self._graphs[len(tokens)].replay(tokens, places)


class _Captured:
    """One graph, and the tensors that it reads and writes."""

    def __init__(self, step: Step, size: int, stream: Any, memory: Any) -> None:
        # Written by the host, copied by the graph itself: one launch a step.
        self._staged = torch.stack([torch.zeros(size, dtype=torch.int64), torch.arange(size)]).pin_memory()
        inputs = self._staged.to(stream.device)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):  # compiles kernels and makes workspaces, outside of the capture
            step(*inputs)
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=memory, stream=stream):
            inputs.copy_(self._staged, non_blocking=True)
            self._decoded = step(*inputs)
        self._inputs = inputs  # the graph knows only its address

    def replay(self, tokens: Sequence[int], places: Sequence[int]) -> Decoded:
        # The last replay has ended, since its logits were looked at: nobody reads these any more.
        self._staged.copy_(torch.tensor([list(tokens), list(places)]))
        self.graph.replay()
        return self._decoded
