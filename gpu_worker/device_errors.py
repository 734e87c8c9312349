"""What a failed device means for this process, in one line that says what to try.

A kernel that fails makes every later call of CUDA fail as well, and memory that lacks once will lack again:
the process ends. Not done here: ending it (`scheduler`, `server`).
"""

from __future__ import annotations

import re

import torch

from common.errors import Unavailable
from common.units import format_bytes

# In what cuBLAS, Triton and calls of the driver raise as a mere RuntimeError.
_OF_A_DEVICE = re.compile(r"CUDA|CUBLAS|cuBLAS|CUDNN|cuMem")


class DeviceFailed(Unavailable):
    """The device failed, and the process ends: callers may turn to its successor."""


def device_failure(error: BaseException, budget: int | None) -> DeviceFailed | None:
    """What to say of `error`; None if it is not the device's. `budget`: bytes of device memory in all."""
    if isinstance(error, DeviceFailed) or not isinstance(error, RuntimeError):
        return error if isinstance(error, DeviceFailed) else None
    # The first line: after it come hints for people who debug PyTorch.
    reported = str(error).split("\n", 1)[0]
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in reported:
        limit = "" if budget is None else f" within a budget of {format_bytes(budget)}"
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", reported)
        more = f": {wanted[1]} more were wanted" if wanted else ""
        return DeviceFailed(
            f"out of device memory{limit}{more}; this worker ends; start it with a larger --vram or a "
            "smaller --max-context"
        )
    if isinstance(error, torch.AcceleratorError) or _OF_A_DEVICE.search(reported):
        return DeviceFailed(
            f"the GPU failed: the driver reported {reported!r}; this worker ends, but the store goes on, "
            "and a new worker can be started at once"
        )
    return None
