"""Kernels beside those of the current stream, in a captured step as in an eager one: a fork and a join.

Not done here: what runs there. On the CPU, where tests run, there is one order and nothing to join.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Branch:
    """One stream beside the current one.

    Between a fork and its join the branch may read what the current stream had written before the fork, and
    nobody else reads what the branch writes, unless kernels agree by atomics as those of `kernels.orders` do.
    Tensors that it reads must live until the join: once they are freed, the current stream writes to their
    memory again. What the branch allocates is reused by it alone.
    """

    def __init__(self, device: torch.device, first: bool = False) -> None:
        """`first`: where both wait for a multiprocessor, its kernels are placed before others."""
        priority = -1 if first else 0
        self._stream = torch.cuda.Stream(device, priority) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Fork: kernels launched in the block run beside those that follow it."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def after(self, other: Branch) -> None:
        """What is launched here from now on waits for what the other branch has."""
        if self._stream is not None and other._stream is not None:
            self._stream.wait_stream(other._stream)

    def join(self) -> None:
        """What follows waits for the branch."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
