"""The pieces around the scan: convolution with a carried state, time steps, gated norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from common.hlwq import native
from gpu_worker.model.mamba2 import MixerKernels, causal_conv, time_step
from gpu_worker.model.nemotron_h import ModelKernels, NemotronH
from gpu_worker.model.norms import gated_group_norm, rms_norm
from tests.helpers.nemotron import make_twins


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution_equals_the_librarys_and_carries_its_state(kernel: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 11, 6, generator=generator), torch.randn(6, kernel, generator=generator)
    bias = torch.randn(6, generator=generator) if with_bias else None
    padded = F.pad(x.transpose(1, 2), (kernel - 1, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=6)).transpose(1, 2)
    state, pieces = x.new_zeros(2, 6, kernel - 1), []
    for piece in x.split([1, 4, 1, 5], dim=1):
        y, state = causal_conv(piece, weight, bias, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), expected)
    assert torch.equal(state, x[:, 11 - (kernel - 1) :].transpose(1, 2))


def test_convolution_rounds_sixteen_bit_sums_once() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*s, generator=generator).bfloat16() for s in ((1, 9, 6), (6, 4), (6,)))
    y, state = causal_conv(x, weight, bias, x.new_zeros(1, 6, 3))
    wide, _ = causal_conv(x.float(), weight.float(), bias.float(), torch.zeros(1, 6, 3))
    assert y.dtype == state.dtype == torch.bfloat16 and torch.equal(y, wide.bfloat16())


def test_time_steps_are_clamped_from_below_in_float32() -> None:
    dt = time_step(torch.tensor([-20.0, 0.0, 3.0]).bfloat16(), torch.tensor([0.0, 0.5, 0.0]), 0.001)
    torch.testing.assert_close(dt, torch.tensor([0.001, 0.974077, 3.048587]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_round_where_transformers_does(dtype: torch.dtype) -> None:
    reference = make_twins().reference.model.layers[0].to(dtype)
    generator = torch.Generator().manual_seed(1)
    x, inner, gate = (torch.randn(50, n, generator=generator).to(dtype) for n in (48, 48, 48))
    with torch.inference_mode(), native.forced(native.PLAIN):
        assert torch.equal(rms_norm(x, reference.norm.weight, 1e-5), reference.norm(x))
        got = gated_group_norm(inner, gate, reference.mixer.norm.weight, 2, 1e-5)
        assert torch.equal(got, reference.mixer.norm(inner, gate))


def test_a_long_prompt_scanned_in_parts_is_scanned_whole() -> None:
    """Parts end inside of chunks and of the convolution's reach, too."""
    twins = make_twins()
    with native.forced(native.PLAIN):
        whole = twins.model.prefill(twins.tokens(50), 0, twins.pools())
        cut = NemotronH(
            twins.config, twins.model.weights, twins.experts, ModelKernels(MixerKernels(tokens=22))
        )
        pools = twins.pools()
        parts = cut.prefill(twins.tokens(50), 0, pools)
    torch.testing.assert_close(parts, whole)
    assert not torch.equal(parts, whole), "it was cut"
    assert pools.lengths[0] == 50 and pools.ssm[:, 0].any()
