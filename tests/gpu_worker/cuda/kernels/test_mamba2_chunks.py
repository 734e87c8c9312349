"""The chunk scan of prompts on the GPU against its twin in PyTorch, and against the sequential form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_worker.cuda.kernels.mamba2_chunks import chunk_scan
from gpu_worker.model.ssd import ssd_chunk_scan, ssd_sequential
from tests.helpers.nemotron import relative_error

SMALL = [  # b, t, h, p, g, n, chunk
    (1, 1, 2, 4, 1, 3, 8),
    (2, 37, 4, 16, 2, 8, 16),
    (1, 50, 6, 5, 3, 7, 32),
]
REAL = (1, 300, 64, 64, 8, 128, 128)


def drawn(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D and a state; x, B and C as views of one tensor, as the convolution leaves them."""
    b, t, h, p, g, n, _ = shape
    generator = torch.Generator().manual_seed(3)
    together = torch.randn(b, t, h * p + 2 * g * n, generator=generator).to(device, dtype)
    x, B, C = together.split([h * p, g * n, g * n], dim=-1)
    dt = torch.nn.functional.softplus(torch.randn(b, t, h, generator=generator)) * 0.3
    A, D = -torch.rand(h, generator=generator) * h - 0.1, torch.randn(h, generator=generator)
    state = torch.randn(b, h, p, n, generator=generator)
    dt, A, D, state = (tensor.to(device) for tensor in (dt, A, D, state))
    return x.unflatten(-1, (h, p)), dt, A, B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n)), D, state


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_the_sequential_form(shape: tuple[int, ...], with_state: bool, device: torch.device) -> None:
    *inputs, state = drawn(shape, device, torch.float32)
    given = state if with_state else None
    y, last = chunk_scan(*inputs, shape[-1], given)
    y_twin, last_twin = ssd_sequential(*inputs, shape[-1], given)
    assert relative_error(y, y_twin) <= 1e-5
    assert relative_error(last, last_twin) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_the_30b_s_shape(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("the interpreter takes too long")
    *inputs, state = drawn(REAL, device, dtype)
    y, last = chunk_scan(*inputs, REAL[-1], state)
    y_twin, last_twin = ssd_chunk_scan(*inputs, REAL[-1], state)
    assert y.dtype == dtype
    assert relative_error(y, y_twin) <= tolerance
    assert relative_error(last, last_twin) <= min(tolerance, 1e-3)


def test_in_parts_it_is_the_same(device: torch.device) -> None:
    """The state goes from one call to the next, bit by bit where the cut is between chunks."""
    x, dt, A, B, C, D, _ = drawn((1, 48, 2, 16, 1, 16, 16), device, torch.float32)
    y, last = chunk_scan(x, dt, A, B, C, D, 16)
    head, state = chunk_scan(x[:, :32], dt[:, :32], A, B[:, :32], C[:, :32], D, 16)
    tail, after = chunk_scan(x[:, 32:], dt[:, 32:], A, B[:, 32:], C[:, 32:], D, 16, state)
    assert torch.equal(torch.cat([head, tail], 1), y)
    assert torch.equal(after, last)


def test_a_huge_step_takes_nothing_from_what_follows(device: torch.device) -> None:
    """Decays above the diagonal overflow, and a float32 sum would have lost the small steps."""
    x, dt, A, B, C, D, _ = drawn((1, 32, 2, 16, 1, 16, 32), device, torch.float32)
    dt = dt.clone()
    dt[:, 3] = 1e6
    y, last = chunk_scan(x, dt, A, B, C, D, 32)
    y_twin, last_twin = ssd_sequential(x, dt, A, B, C, D, 32)
    assert bool(torch.isfinite(y).all())
    assert relative_error(y[:, 4:], y_twin[:, 4:]) <= 1e-5
    assert relative_error(last, last_twin) <= 1e-5
