"""What lies around the scan of a prompt, against its twins in PyTorch, however a prompt is cut."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpu_worker.cuda.kernels import mamba2_prompt
from gpu_worker.cuda.kernels.mamba2_prompt import gated_group_norm, scan_inputs
from gpu_worker.cuda.prompt_kernels import MIXER_KERNELS
from gpu_worker.model import mamba2, norms
from gpu_worker.model.mamba2 import Mamba2
from tests.helpers.mamba2 import DrawnBlock
from tests.helpers.nemotron import relative_error

DTYPES = [torch.float32, torch.bfloat16]
SMALL = {"mamba_num_heads": 2, "mamba_head_dim": 24, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}
SHAPES: list[dict[str, Any]] = [
    SMALL,
    SMALL | {"mamba_num_heads": 6, "ssm_state_size": 12, "n_groups": 3, "time_step_min": 0.05},
    SMALL | {"mamba_num_heads": 3, "mamba_head_dim": 33, "n_groups": 1, "conv_kernel": 1},
    SMALL | {"mamba_head_dim": 9, "n_groups": 1, "conv_kernel": 2, "use_conv_bias": False},
    SMALL | {"conv_kernel": 5},
]
REAL = {"mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8}
# Tokens a program, and at once: Triton's interpreter takes its time with each.
ROWS, AT_ONCE = (64, 8) if torch.cuda.is_available() else (8, 4)
LENGTHS = [1, 3, ROWS + 3]  # fewer than the convolution reaches back, and more than a program has
CUTS = [[1, 2, 1, 1, 5], [ROWS - 1, 1, 4], [ROWS + 3, 2]]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba2_prompt, "_ROWS", ROWS)
    monkeypatch.setattr(mamba2_prompt, "_AT_ONCE", AT_ONCE)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x float32 in `dtype`, as a kernel stores it: Triton's interpreter cuts bfloat16 off, a GPU rounds."""
    if dtype is torch.bfloat16 and not x.is_cuda:
        return (x.contiguous().view(torch.int32) & -0x10000).view(torch.float32).to(dtype)
    return x.to(dtype)


def check_close(got: Tensor, wide: Tensor, dtype: torch.dtype) -> None:
    """`got` is `wide`, which is float32, up to its last digits, and has them rounded but seldom otherwise."""
    assert got.dtype == dtype and got.shape == wide.shape
    if dtype is torch.float32:
        torch.testing.assert_close(got, wide, rtol=2e-6, atol=2e-6)
        return
    torch.testing.assert_close(got.float(), wide, rtol=2**-7, atol=2e-6)
    assert (got != rounded(wide, dtype)).float().mean() <= 0.01


class Block(DrawnBlock):
    """With states of two sequences."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: dict[str, Any]) -> None:
        super().__init__(device, dtype, shape, sequences=2)

    def projected(self, sequences: int, tokens: int) -> Tensor:
        """As views of a larger tensor."""
        return self.draw(sequences, tokens + 1, self.width + 3).mul_(3)[:, 1:, : self.width]

    def inputs(self, projected: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return scan_inputs(projected, state, self.weights, self.config)

    def check_inputs(self, projected: Tensor) -> None:
        """Against the twin in float32, of the same inputs and weights."""
        state, w = self.conv[: len(projected)], self.weights
        convolved, steps, after = self.inputs(projected, state)
        _, twin_steps, twin_after = mamba2.scan_inputs(projected, state, w, self.config)
        inner, channels = self.config.mamba_intermediate_size, self.config.conv_dim
        xBC, bias = projected[..., inner : inner + channels].float(), w.conv1d_bias
        bias = None if bias is None else bias.float()
        wide, _ = mamba2.causal_conv(xBC, w.conv1d_weight.float(), bias, state.float())
        check_close(convolved, wide, self.dtype)
        check_close(steps, twin_steps, torch.float32)
        assert after.shape == twin_after.shape and torch.equal(after, twin_after), (
            "inputs are kept as they are"
        )


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_equal_their_twin(device: torch.device, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    block = Block(device, dtype, shape)
    for tokens in LENGTHS:
        block.check_inputs(block.projected(1 + tokens % 2, tokens))


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_in_parts_are_the_same_bits(device: torch.device, dtype: torch.dtype, cuts: list[int]) -> None:
    block = Block(device, dtype, SHAPES[1])
    projected, state = block.projected(1, sum(cuts)), block.conv[:1]
    whole = block.inputs(projected, state)
    parts = []
    for part in projected.split(cuts, dim=1):
        *part_, state = block.inputs(part, state)
        parts.append(part_)
    for together, pieces in zip(whole[:2], zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces, 1), together)
    assert torch.equal(state, whole[2])


def test_small_and_large_time_steps_keep_their_digits(device: torch.device) -> None:
    """softplus where exp(dt) vanishes beside 1, where it is largest beside it, and where it overflows."""
    dt = torch.tensor([-300.0, -12.0, -6.0, -1.0, 0.0, 1.0, 19.0, 30.0, 300.0], device=device)
    block = Block(device, torch.float32, SMALL | {"mamba_num_heads": len(dt), "n_groups": 1})
    block.weights.dt_bias.zero_()
    projected = block.projected(1, 3)
    projected[..., -len(dt) :] = dt
    steps = block.inputs(projected, block.conv[:1])[1]
    torch.testing.assert_close(steps, torch.nn.functional.softplus(dt).expand_as(steps), rtol=1e-6, atol=0)


def test_extremes_stay_finite(device: torch.device) -> None:
    block = Block(device, torch.float32, SMALL)
    for value in (-300.0, 300.0):
        projected = torch.full_like(block.projected(1, 5), value)
        with np.errstate(over="ignore"):  # the interpreter's exp2 overflows to infinity in silu, as it should
            block.check_inputs(projected)
            normed = gated_group_norm(projected, projected, torch.ones_like(projected[0, 0]), 1, 1e-5)
        assert bool(torch.isfinite(normed).all())


def drawn_norm(
    device: torch.device, dtype: torch.dtype, tokens: int, groups: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x and gate of one or two sequences, as rows of larger tensors, and a weight."""
    generator = torch.Generator().manual_seed(tokens)
    columns, sequences = groups * size, 1 + tokens % 2

    def wide(more: int) -> Tensor:
        return 2 * torch.randn(sequences, tokens + 1, columns + more, generator=generator)

    x, gate, weight = wide(8), wide(3), torch.randn(columns, generator=generator)
    # Groups differ in what they are divided by, and rows too.
    x[..., :columns] *= torch.arange(1, groups + 1).repeat_interleave(size)
    x *= torch.arange(tokens + 1)[:, None]
    x, gate = (drawn.to(device, dtype)[:, 1:, :columns] for drawn in (x, gate))
    return x, gate, weight.to(device, dtype)


@pytest.mark.parametrize(("groups", "size"), [(2, 24), (3, 33), (1, 7), (8, 16), (2, 512)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_equals_its_twin(device: torch.device, dtype: torch.dtype, groups: int, size: int) -> None:
    for tokens in (1, 3, 8):
        x, gate, weight = drawn_norm(device, dtype, tokens, groups, size)
        got = gated_group_norm(x, gate, weight, groups, 1e-2)
        ones = torch.ones_like(weight, dtype=torch.float32)
        normalised = norms.gated_group_norm(x.float(), gate.float(), ones, groups, 1e-2)
        check_close(got, weight.float() * rounded(normalised, dtype).float(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_of_a_row_is_the_same_bits_anywhere(device: torch.device, dtype: torch.dtype) -> None:
    x, gate, weight = drawn_norm(device, dtype, 9, 3, 64)
    whole = gated_group_norm(x, gate, weight, 3, 1e-5)
    for start, end in [(0, 1), (1, 2), (3, 9), (8, 9), (2, 7)]:
        part = gated_group_norm(x[:, start:end], gate[:, start:end], weight, 3, 1e-5)
        assert torch.equal(part, whole[:, start:end])


@pytest.mark.parametrize("shape", SHAPES[:2], ids=range(2))
@pytest.mark.parametrize("tokens", [1, 2, 19])
def test_a_mixer_by_kernels_equals_the_plain_one(
    device: torch.device, shape: dict[str, Any], tokens: int
) -> None:
    block = Block(device, torch.float32, shape)
    projected, places = block.projected(1, tokens), torch.tensor([1], device=device)
    states = [(block.conv.clone(), block.ssm.clone()) for _ in range(2)]
    plain, fast = (Mamba2(block.weights, block.config, 0, *given) for given in ((), (MIXER_KERNELS,)))
    for _ in range(2):  # states go on
        expected, got = (
            mixer.scan(projected, *state, places) for mixer, state in zip((plain, fast), states, strict=True)
        )
        assert relative_error(got, expected) <= 1e-5
    (conv, ssm), (fast_conv, fast_ssm) = states
    assert torch.equal(fast_conv, conv) and relative_error(fast_ssm, ssm) <= 1e-5
    assert not torch.equal(conv[1], block.conv[1]) and torch.equal(fast_ssm[0], block.ssm[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_30b_s_shape(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        pytest.skip("the interpreter takes too long")
    block = Block(device, dtype, REAL)
    inner, width = 4096, 10304
    cuts = list(accumulate([0, 1, 1022, 1025, 2048]))
    projected, x = (block.draw(1, cuts[-1], columns) for columns in (width, inner))
    block.check_inputs(projected)
    whole = gated_group_norm(x, projected[..., :inner], block.weights.norm, 8, 1e-5)
    for start, end in pairwise(cuts):
        gate = projected[:, start:end, :inner]
        part = gated_group_norm(x[:, start:end], gate, block.weights.norm, 8, 1e-5)
        assert torch.equal(part, whole[:, start:end])
    twin = norms.gated_group_norm(x, projected[..., :inner], block.weights.norm, 8, 1e-5)
    assert relative_error(whole, twin) <= (1e-6 if dtype is torch.float32 else 1e-3)
