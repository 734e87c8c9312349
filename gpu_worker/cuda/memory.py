"""A GPU's memory: what it has, what CUDA and steps take of it beside weights and states, what is in use.

The allocator is kept within the budget, so that nothing spills: cached blocks are given back first, and what
does not fit even then ends the process (`gpu_worker.device_errors`). Not done here: dividing (`sizing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from common.units import format_bytes
from gpu_worker.account import Entry
from gpu_worker.engine import prefill_chunk

if TYPE_CHECKING:
    from gpu_worker.account import Sizes

# What CUDA takes for a process. It can be told from the rest only as long as nobody else uses the device,
# so no more than this is believed to be ours; kernels' code comes on top of it when they are first launched.
_MOST_CONTEXT = 640 << 20
_CODE = 288 << 20  # after long prompts, on an H100
_CUBLAS = 96 << 20  # workspaces, 32 MB for each stream that multiplies plain matrices
_GRAPH = 16 << 20  # a captured step, its logits apart
_LARGE, _ROUNDED = 10 << 20, 2 << 20  # PyTorch's allocator rounds sizes from 10 MB up to whole 2 MB
_FRAGMENTS = 64 << 20  # and loses as much in segments that smaller tensors share
# Left alone by `auto`: what drives a display or computes beside this process needs more at times, a full
# device makes that fail, and what is counted here is not known to the last megabyte.
_RESERVE = 1 / 20


class MemoryUse(NamedTuple):
    """Bytes that this process takes of the device, CUDA's own included; `tensors` are the most that lived."""

    now: int
    peak: int
    tensors: int

    def describe(self, budget: int | None) -> str:
        """Beside the budget."""
        of = "" if budget is None else f" of a budget of {format_bytes(budget)}"
        over = (
            "" if budget is None or self.peak <= budget else f", {format_bytes(self.peak - budget)} too much"
        )
        return (
            f"device memory: at most {format_bytes(self.peak)}{of}{over} "
            f"(tensors {format_bytes(self.tensors)}), now {format_bytes(self.now)}"
        )


def captured_sizes(sequences: int) -> list[int]:
    """How many sequences captured steps have: 1, 2, 4, 8, 16, up to that."""
    return [1 << power for power in range(sequences.bit_length())]


class DeviceMemory:
    """Reads one device; to be made before anything is allocated there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        free, self.total = torch.cuda.mem_get_info(device)  # makes CUDA's context, if there is none yet
        taken = self.total - free - torch.cuda.memory_reserved(device)
        self.context = min(taken, _MOST_CONTEXT)
        self._others = taken - self.context

    @property
    def available(self) -> int:
        """Bytes that this process could take now, those that it has included."""
        return self.total - self._others

    @property
    def automatic(self) -> int:
        """The budget where none is named."""
        return self.available - int(self.total * _RESERVE)

    def entries(self, sizes: Sizes, context: int, dense: Sequence[int], captured: bool) -> tuple[Entry, ...]:
        """What a GPU takes in addition; `dense`: bytes of the dense weights' tensors."""
        from gpu_worker.cuda.staging_ring import GROUPS, WAVE
        from gpu_worker.cuda.workspace import prompt_workspace

        chunk = min(prefill_chunk(self.device), context)
        graphs = captured_sizes(sizes.sequences) if captured else []
        logits = sizes.model.vocab_size * torch.float32.itemsize
        steps = f"for {', '.join(map(str, graphs))} at a time" if graphs else "none"
        rounding = sum(-size % _ROUNDED for size in dense if size >= _LARGE)
        return (
            Entry(
                "prompts", prompt_workspace(sizes.model, chunk, sizes.dtype), f"chunks of {chunk:,} tokens"
            ),
            Entry("staging ring", GROUPS * WAVE * sizes.stride, f"{GROUPS * WAVE} records"),
            Entry("captured steps", sum(_GRAPH + 2 * size * logits for size in graphs), steps),
            Entry("CUDA", self.context + _CODE + _CUBLAS, "context, kernels, cuBLAS"),
            Entry("allocator", rounding + _FRAGMENTS, "rounding, fragments"),
        )

    def keep_within(self, budget: int) -> None:
        """From now on PyTorch's allocator takes no more than is left beside CUDA's own."""
        share = (budget - self.context - _CODE) / self.total
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))  # of the current device

    def use(self) -> MemoryUse:
        """What other processes take is counted as it was at the start: CUDA does not tell whose is whose."""
        free, _ = torch.cuda.mem_get_info(self.device)
        now = self.total - free - self._others
        cached = torch.cuda.memory_reserved(self.device)
        peak = now - cached + torch.cuda.max_memory_reserved(self.device)
        return MemoryUse(now, peak, torch.cuda.max_memory_allocated(self.device))
