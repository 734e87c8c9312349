"""The lane: missing experts that the host's processor computes, beside those that come over the link.

Owns the mailbox and the thread that answers it. Used only where it gives the device's bits, which is tried at
start, and only as far as it pays: the share that is handed over balances the processor's time for an expert
with the link's, both measured then. Not done here: choosing experts and asking (`kernels.lane`), the
arithmetic (`gpu_worker.kernels.expert_lane`).
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from common.hlwq import native
from common.hlwq.planes import padded
from common.model_config import ModelConfig
from common.record import RecordLayout, RecordLayouts
from gpu_worker.cuda import probe
from gpu_worker.cuda.host_memory import RegisteredArena
from gpu_worker.cuda.kernels.lane import SHARES, Lane
from gpu_worker.cuda.kernels.orders import PROGRAMS, Coming, copy, no_orders
from gpu_worker.cuda.kernels.rotation import rotate
from gpu_worker.cuda.linear import Activations
from gpu_worker.cuda.step_experts import SlotKernels
from gpu_worker.kernels import expert_lane
from gpu_worker.kernels.expert_lane import MOST_PAIRS, ExpertLane, Mailbox

log = logging.getLogger(__name__)

NO_LANE = "no expert is computed on the CPU: %s"

_LEFT_ALONE = 3  # cores that the worker's own threads, the driver's and the store's have
_FEWEST, _MOST = 2, 16  # threads that are worth it, and that one record can feed
_MEASURED = 24  # records


class HostLane:
    """Answers what steps hand over, from construction to `close`."""

    def __init__(
        self, layouts: RecordLayouts, frames: Tensor, pairs: int, device: torch.device, share: int
    ) -> None:
        """frames (n, stride) uint8 on the host, never reused; pairs: of a step of one sequence."""
        mailbox = Mailbox.allocate(layouts, pairs, pinned=device.type == "cuda")
        self.tensors = Lane.of(mailbox, len(layouts.layers), share, device)
        self._lane = ExpertLane(layouts, frames, mailbox)
        self._lane.start()

    def wake(self) -> None:
        """Before every step that may hand something over."""
        self._lane.wake()

    def close(self) -> None:
        """Once no step is under way."""
        self._lane.close()


def host_lane(
    layouts: RecordLayouts, arena: RegisteredArena, pool: Tensor, config: ModelConfig, threads: int | None
) -> HostLane | None:
    """A lane of so many threads, or as many as are to spare; None, and a line in the log, where it cannot be.

    arena: every expert is READY there for good; pool (slots, stride) uint8: free slots, to measure by.
    """
    threads = spare_threads() if threads is None else threads
    reason = _unusable(layouts, config, threads) or _differs(layouts, arena, pool.device)
    if reason is not None:
        log.info(NO_LANE, reason)
        return None
    native.set_threads(threads)
    here, link = _seconds_here(layouts[0], _some(arena, 0)), _seconds_by_link(arena.frames, pool)
    share = round(SHARES.value * link / (here + link))
    if share == 0:
        log.info(NO_LANE, f"it takes {here * 1e6:.0f} us for each, the link {link * 1e6:.0f} us")
        return None
    log.info(
        "of missing experts that nobody has begun to copy, the CPU computes %d of %d: %.0f us each with %d "
        "threads, %.0f us by the link",
        share, SHARES.value, here * 1e6, threads, link * 1e6,
    )  # fmt: skip
    return HostLane(layouts, arena.frames, config.num_experts_per_tok, pool.device, share)


def spare_threads(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Of the processor's cores that this process may run on; `quota`: what a container may use of them."""
    cores = len(os.sched_getaffinity(0))
    words = quota.read_text().split() if quota.is_file() else []
    if len(words) == 2 and words[0].isdecimal():
        cores = min(cores, int(words[0]) // int(words[1]))
    return min(_MOST, cores - _LEFT_ALONE)


def _unusable(layouts: RecordLayouts, config: ModelConfig, threads: int) -> str | None:
    if threads < _FEWEST:
        return f"that takes {_FEWEST} threads at least, not {max(threads, 0)}"
    if config.num_experts_per_tok > MOST_PAIRS:
        return f"a token has more than {MOST_PAIRS} experts"
    return expert_lane.usable(layouts)


def _differs(layouts: RecordLayouts, arena: RegisteredArena, device: torch.device) -> str | None:
    """Why the host's bits are not the device's, layout by layout; None if they are."""
    draw, slot_ids = torch.Generator().manual_seed(0), torch.zeros(1, dtype=torch.int32, device=device)
    nothing, base = no_orders(1, 1, device), torch.zeros(1, dtype=torch.int64, device=device)
    for layout in dict.fromkeys(layouts.layers):
        record = _some(arena, layouts.layers.index(layout))[0]
        x = rotate(torch.randn(1, layout.up.in_features, generator=draw).to(device))
        pool = record.to(device)[None]
        copy(range(1), nothing, base, pool[None], wait=True)  # as in a step, for the same kernels
        coming = Coming(nothing, 0)
        expected = SlotKernels(layout)(Activations(None, x), pool, slot_ids, 1, coming=coming).cpu()
        found = torch.empty_like(expected)
        expert_lane.device_experts(layout, [record], x.cpu(), found)
        if not torch.equal(found, expected):
            return "it adds in another order than this GPU's kernels do"
    return None


def _some(arena: RegisteredArena, layer: int) -> list[Tensor]:
    """Records of a layer."""
    return [arena.frames[frame] for frame in arena.frame_of[layer, :_MEASURED].tolist()]


def _seconds_here(layout: RecordLayout, records: list[Tensor]) -> float:
    """Median, each record read for the first time in a while."""
    x, products = torch.randn(padded(layout.up.in_features)), torch.empty(2, layout.down.out_features)
    times = []
    for pair in zip(records[::2], records[1::2], strict=False):
        started = time.perf_counter()
        expert_lane.device_experts(layout, pair, x, products)
        times.append(time.perf_counter() - started)
    return statistics.median(times) / 2


def _seconds_by_link(frames: Tensor, pool: Tensor) -> float:
    """Of a record among others, by the kernel that steps fetch with."""
    some = frames[: len(pool)][:_MEASURED]
    return some.shape[1] / probe.kernel_reads(some, pool[: len(some)], PROGRAMS)
