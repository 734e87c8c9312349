"""What this GPU and its link can do: the numbers that choices are made by.

Each function measures one thing, by CUDA events, and gives a median. `scripts/probe_device.py` runs them all.
Not done here: deciding anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gpu_worker.cuda.driver import copy_all
from gpu_worker.cuda.kernels.orders import chunks_of, copy, no_orders

_REPEATS = 5
_LAUNCHES = 500


def seconds(action: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Median time of `action` on the current stream, after one run that is not counted."""
    action()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        action()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_engine(frames: Tensor, pool: Tensor) -> float:
    """Bytes a second of one large copy: frames (n, stride) on the host to pool (n, stride) on the device."""
    return frames.nbytes / seconds(lambda: pool.copy_(frames, non_blocking=True))


def batched_copies(frames: Tensor, pool: Tensor, count: int) -> float:
    """Bytes a second of `count` records in one submission."""
    pairs, stream = list(zip(frames[:count], pool[:count], strict=True)), torch.cuda.Stream(pool.device)
    with torch.cuda.stream(stream):  # the default stream takes no batches
        return frames[:count].nbytes / seconds(lambda: copy_all(pairs, stream))


def kernel_reads(frames: Tensor, pool: Tensor, programs: int) -> float:
    """Bytes a second of the kernel that decode steps fetch with, every record missing."""
    (count, stride), device = frames.shape, pool.device
    orders, base = no_orders(1, count, device), torch.tensor([frames.data_ptr()], device=device)
    places = torch.arange(count, dtype=torch.int32, device=device)
    for column in (orders.frame, orders.slot):
        column[0, -count:] = places
    orders.due[0, -count:] = chunks_of(stride)

    def fetch() -> None:
        for column in (orders.claimed, orders.done):
            column[0, -count:] = 0
        copy(range(1), orders, base, pool[None], wait=True, programs=programs)

    return frames.nbytes / seconds(fetch)


def device_copies(size: int, device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes inside the device."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source))


def eager_launch(device: torch.device) -> float:
    """Seconds of one small operation of PyTorch, in a row of many."""
    x = torch.zeros(16, device=device)
    return seconds(lambda: [x.add_(1) for _ in range(_LAUNCHES)]) / _LAUNCHES


def graph_node(device: torch.device) -> float:
    """Seconds of the same operation as a node of a captured graph."""
    x = torch.zeros(16, device=device)
    x.add_(1)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            x.add_(1)
    return seconds(graph.replay) / _LAUNCHES


def round_trip(device: torch.device) -> float:
    """Seconds until the host has read one number of the device's."""
    x, times = torch.zeros(1, device=device), []
    for _ in range(_LAUNCHES):
        started = time.perf_counter()
        x.item()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
