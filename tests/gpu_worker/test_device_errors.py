"""A failed device in one line, and every other error left as it is."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.device_errors import DeviceFailed, device_failure

LONG = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.60 GiB of which 8 MiB "
    "is free.\nSee documentation for Memory Management"
)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(LONG), RuntimeError("CUDA error: out of memory\nCUDA kernel errors ...")]
)
def test_out_of_memory_names_the_budget_and_what_to_try(error: RuntimeError) -> None:
    failure = device_failure(error, 7_600_000_000)
    assert failure is not None
    for words in ("out of device memory", "budget of 7.6 GB", "--vram", "--max-context", "worker ends"):
        assert words in str(failure)
    assert "\n" not in str(failure)
    assert ("2.00 GiB more were wanted" in str(failure)) == isinstance(error, torch.OutOfMemoryError)
    assert "budget" not in str(device_failure(error, None))


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(
            "CUDA error: an illegal memory access was encountered\nCUDA kernel errors ..."
        ),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("cuMemcpyBatchAsync failed with CUDA driver error 700"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    ],
)
def test_any_other_failure_says_what_the_driver_reported(error: RuntimeError) -> None:
    failure = device_failure(error, None)
    assert failure is not None
    assert str(error).split("\n")[0] in str(failure) and "\n" not in str(failure)
    assert "the store goes on" in str(failure)


@pytest.mark.parametrize(
    "error", [AssertionError("CUDA"), RuntimeError("a size does not match"), ValueError("out of memory")]
)
def test_what_is_no_devices_is_left_alone(error: Exception) -> None:
    assert device_failure(error, None) is None


def test_what_was_told_already_is_told_once() -> None:
    failure = DeviceFailed("as it is")
    assert device_failure(failure, None) is failure
