"""The norm before a block of a prompt against its twin."""

import pytest
import torch

from gpu_worker.cuda.kernels.added_norm import added_norm
from gpu_worker.model import norms

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # the interpreter cuts bfloat16 off


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (5, 200), (3, 2688)])
def test_equals_its_twin(device: torch.device, rows: int, columns: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(columns)
    hidden, added = (torch.randn(rows, columns, generator=draw).to(device, dtype) * 3 for _ in range(2))
    weight = torch.rand(columns, generator=draw).to(device, dtype) + 0.5
    wide = norms.added_norm(*(tensor.float() for tensor in (hidden, added, weight)), 1e-5)
    total, normed = added_norm(hidden, added, weight, 1e-5)
    assert total.data_ptr() == hidden.data_ptr(), "the residual stream stays where it is"
    for found, expected in zip((total, normed), wide, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype])
    # What the next block adds to is what was normed.
    again = norms.rms_norm(total, weight, 1e-5)
    torch.testing.assert_close(normed.float(), again.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_row_is_the_same_alone_and_among_others(device: torch.device) -> None:
    hidden, added = (torch.randn(6, 200, device=device).bfloat16() for _ in range(2))
    weight = torch.rand(200, device=device).bfloat16()
    alone = [added_norm(hidden[i : i + 1].clone(), added[i : i + 1], weight, 1e-5)[1] for i in range(6)]
    assert torch.equal(torch.cat(alone), added_norm(hidden, added, weight, 1e-5)[1])
