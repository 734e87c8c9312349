"""The chunk scan against its sequential twin: values, carried state, odd lengths, gradients, extreme decays.

Tolerances are relative to the largest entry of the compared tensor, since single outputs may cancel to nearly
zero.
"""

import pytest
import torch

from gpu_worker.model.ssd import ssd_chunk_scan, ssd_sequential, ssd_step

TOLERANCE = 1e-5
SHAPES = [  # b, t, h, p, g, n, chunk
    (1, 1, 2, 4, 1, 3, 8),
    (2, 37, 8, 16, 2, 8, 16),
    (1, 64, 4, 8, 4, 16, 16),
    (3, 50, 6, 5, 3, 7, 64),
    (1, 300, 8, 64, 2, 32, 128),
]


def random_inputs(b, t, h, p, g, n, seed=0, dt_scale=0.3, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    x, B, C = (normal(b, t, *tail).to(dtype) for tail in ((h, p), (g, n), (g, n)))
    dt = torch.nn.functional.softplus(normal(b, t, h)) * dt_scale
    A = -torch.rand(h, generator=gen) * h - 0.1
    return x, dt, A, B, C, normal(h)


def random_state(b, h, p, n):
    return torch.randn(b, h, p, n, generator=torch.Generator().manual_seed(9))


def relative_error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_state", [False, True])
def test_chunk_scan_equals_sequential(shape, with_state):
    b, t, h, p, g, n, chunk = shape
    inputs = random_inputs(b, t, h, p, g, n)
    state = random_state(b, h, p, n) if with_state else None
    y, final = ssd_chunk_scan(*inputs, chunk, state)
    y_twin, final_twin = ssd_sequential(*inputs, chunk, state)
    assert y.shape == (b, t, h, p) and final.shape == (b, h, p, n)
    assert relative_error(y, y_twin) <= TOLERANCE
    assert relative_error(final, final_twin) <= TOLERANCE


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 31, 49])
def test_split_with_carried_state_equals_the_whole(cut):
    x, dt, A, B, C, D = random_inputs(2, 50, 4, 8, 2, 8)
    y, final = ssd_chunk_scan(x, dt, A, B, C, D, 16)
    y_head, state = ssd_chunk_scan(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, 16)
    y_tail, last = ssd_chunk_scan(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, 16, state)
    assert relative_error(torch.cat([y_head, y_tail], dim=1), y) <= TOLERANCE
    assert relative_error(last, final) <= TOLERANCE


def test_scan_then_step_equals_a_longer_scan():
    x, dt, A, B, C, D = random_inputs(2, 34, 4, 8, 2, 8)
    y, final = ssd_chunk_scan(x, dt, A, B, C, D, 16)
    _, state = ssd_chunk_scan(x[:, :-1], dt[:, :-1], A, B[:, :-1], C[:, :-1], D, 16)
    y_last, state = ssd_step(x[:, -1], dt[:, -1], A, B[:, -1], C[:, -1], D, state)
    assert relative_error(y_last, y[:, -1]) <= TOLERANCE
    assert relative_error(state, final) <= TOLERANCE


def gradients(scan, inputs, state, chunk):
    leaves = [m.clone().requires_grad_() for m in (*inputs, state)]
    y, final = scan(*leaves[:6], chunk, leaves[6])
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    ((y * weights).sum() + final.square().sum()).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dt_scale", [0.3, 60.0])
def test_gradients_are_finite_and_equal_the_twins(dt_scale):
    """dt_scale 60 makes the masked exponents overflow: a mask after exp would give NaN gradients."""
    b, t, h, p, g, n, chunk = 2, 41, 4, 6, 2, 5, 16
    inputs, state = random_inputs(b, t, h, p, g, n, dt_scale=dt_scale), random_state(b, h, p, n)
    got = gradients(ssd_chunk_scan, inputs, state, chunk)
    expected = gradients(ssd_sequential, inputs, state, chunk)
    for name, mine, twin in zip(("x", "dt", "A", "B", "C", "D", "state"), got, expected, strict=True):
        assert torch.isfinite(mine).all(), name
        assert relative_error(mine, twin) <= 5 * TOLERANCE, name


def test_small_decays_after_a_huge_one_keep_their_digits():
    """A float32 running sum of dt * A is too coarse here: its differences are off in the fourth digit."""
    x, dt, A, B, C, D = random_inputs(1, 64, 2, 8, 1, 8, dt_scale=0.01)
    dt[:, 3] = 5000.0
    y, final = ssd_chunk_scan(x, dt, A, B, C, D, 64)
    y_twin, final_twin = ssd_sequential(x, dt, A, B, C, D, 64)
    assert relative_error(y[:, 4:], y_twin[:, 4:]) <= TOLERANCE
    assert relative_error(final, final_twin) <= TOLERANCE


def test_bfloat16_inputs_are_computed_in_float32():
    inputs = random_inputs(1, 40, 4, 8, 2, 8, dtype=torch.bfloat16)
    y, final = ssd_chunk_scan(*inputs, 16)
    widened = [m.float() for m in inputs]
    y_float, final_float = ssd_chunk_scan(*widened, 16)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert torch.equal(y, y_float.bfloat16()) and torch.equal(final, final_float)
