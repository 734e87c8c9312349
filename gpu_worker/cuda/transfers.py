"""A few numbers between host and device, without the host waiting for more than it must.

Page-locked memory on the host's side: PyTorch waits for the stream at every transfer of other memory. On a
CPU, where tests run, nothing has to travel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """`values` on the device, for what is launched from now on; never waits."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Download:
    """Tensors of integers below 2^31 on their way to the host, all in one transfer."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """They may change once this has returned: work that is launched later does not reach the copy."""
        self._sizes = [tensor.numel() for tensor in tensors]
        self._values = torch.cat([tensor.flatten().int() for tensor in tensors])
        self._arrived: torch.cuda.Event | None = None
        if self._values.is_cuda:
            on_host = torch.empty(self._values.shape, dtype=torch.int32, pin_memory=True)
            self._values = on_host.copy_(self._values, non_blocking=True)
            self._arrived = torch.cuda.current_stream().record_event()

    def wait(self) -> list[list[int]]:
        """The values of each tensor, once they are here; work launched since then is not waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [piece.tolist() for piece in self._values.split(self._sizes)]
