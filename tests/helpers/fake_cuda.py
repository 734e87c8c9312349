"""As much of `torch.cuda` as says how much memory there is, for machines without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from gpu_worker.cuda.memory import DeviceMemory


@dataclass
class FakeCuda:
    """Bytes of a device: `total`, what other processes take, CUDA's context, what the allocator holds."""

    total: int
    others: int = 0
    context: int = 500_000_000
    reserved: int = 0
    most_reserved: int = 0
    most_allocated: int = 0
    share: float = 1.0  # of the total, for the allocator

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> DeviceMemory:
        """Stand in for the device from now on; returns what a worker makes of it."""
        free = lambda device: (self.total - self.others - self.context - self.reserved, self.total)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "mem_get_info", free)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.most_reserved)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.most_allocated)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self._limit)
        return DeviceMemory(torch.device("cuda"))

    def _limit(self, share: float) -> None:
        self.share = share
