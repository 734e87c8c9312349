"""The link from memory to this GPU: the measure of what decoding moves over it.

As a script it answers `measure`, see `gpu_child`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from gpu_child import answers
from gpu_report import Row

_RECORDS, _STRIDE = 138, 6_500_352  # what a token of the 30B needs, at 5 bits


@dataclass(frozen=True)
class LinkRow(Row):
    """One way over the link."""

    title: ClassVar[str] = "host to device, page-locked memory"

    what: str
    bytes_per_second: float

    def cells(self) -> dict[str, str]:
        return {"what": f"{self.what:>40}", "GB/s": f"{self.bytes_per_second / 1e9:.1f}"}


def benchmark() -> Iterator[LinkRow]:
    """A row for each way; raises Ended."""
    for answer in answers("gpu_link.py", {}):
        yield LinkRow("link", **answer)


def measure() -> Iterator[tuple[str, float]]:
    """Bytes a second by the copy engine, and by the kernel that decode steps fetch with."""
    from gpu_worker.cuda import probe  # Triton is for those who have a GPU

    frames = torch.randint(256, (_RECORDS, _STRIDE), dtype=torch.uint8).pin_memory()
    pool = torch.empty(frames.shape, dtype=torch.uint8, device="cuda")
    yield "one copy", probe.copy_engine(frames, pool)
    yield f"{_RECORDS} records in one call", probe.batched_copies(frames, pool, _RECORDS)
    yield "records read by a kernel", probe.kernel_reads(frames, pool, 16)


def main() -> None:
    for what, rate in measure():
        print(json.dumps({"what": what, "bytes_per_second": rate}), flush=True)


if __name__ == "__main__":
    main()
