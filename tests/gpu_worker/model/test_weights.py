"""Building weights from names: what is cast, what is not, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.errors import CheckpointError
from common.hlwq import native
from common.hlwq.matrix import PackedMatrix
from gpu_worker.model.linear import Linear
from gpu_worker.model.weights import Mamba2Weights, MoEWeights, build_weights
from tests.helpers.nemotron import Twins, make_twins

KEPT_IN_FLOAT32 = {"dt_bias", "A", "D", "weight", "e_score_correction_bias"}


@pytest.fixture(scope="module")
def twins() -> Twins:
    return make_twins()


def test_sixteen_bit_weights_are_raised_to_the_compute_type(twins: Twins) -> None:
    halved = {name: tensor.bfloat16() for name, tensor in twins.dense.items()}
    with native.forced(native.PLAIN):
        weights = build_weights(halved, twins.config, torch.float32)
    assert weights.lm_head.weight.dtype == weights.blocks[0].norm.dtype == torch.float32
    assert torch.equal(weights.lm_head.weight, halved["lm_head.weight"].float())


def test_the_native_kernels_take_bfloat16_matrices_as_they_are(twins: Twins) -> None:
    halved = {name: tensor.bfloat16() for name, tensor in twins.dense.items()}
    matrix = build_weights(halved, twins.config, torch.float32).lm_head.weight
    assert isinstance(matrix, PackedMatrix) and matrix.bits == 16
    assert matrix.planes[0].data_ptr() == halved["lm_head.weight"].data_ptr(), "nothing is copied"
    x = torch.randn(3, 48)
    torch.testing.assert_close(
        matrix.product(x), x @ halved["lm_head.weight"].float().T, rtol=1e-5, atol=1e-5
    )


def test_recurrences_and_routers_stay_float32(twins: Twins) -> None:
    weights = build_weights(twins.dense, twins.config, torch.bfloat16)
    mamba, moe = weights.blocks[0].mixer, weights.blocks[1].mixer
    assert isinstance(mamba, Mamba2Weights) and isinstance(moe, MoEWeights)
    for owner in (mamba, moe.gate, moe.shared_experts):
        for name, tensor in vars(owner).items():
            tensor = tensor.weight if isinstance(tensor, Linear) else tensor
            assert tensor.dtype == (torch.float32 if name in KEPT_IN_FLOAT32 else torch.bfloat16), name
    assert torch.equal(mamba.A, -twins.dense["backbone.layers.0.mixer.A_log"].exp())


def test_every_missing_tensor_is_named(twins: Twins) -> None:
    for name in twins.dense:
        rest = {other: tensor for other, tensor in twins.dense.items() if other != name}
        with pytest.raises(CheckpointError, match=f"'{name}' is missing"):
            build_weights(rest, twins.config)


def test_every_misshapen_tensor_is_named(twins: Twins) -> None:
    for name, tensor in twins.dense.items():
        longer: dict[str, Tensor] = twins.dense | {name: torch.cat([tensor, tensor])}
        with pytest.raises(CheckpointError, match=f"'{name}' has shape .* its config says"):
            build_weights(longer, twins.config)


def test_a_tensor_without_a_place_is_refused(twins: Twins) -> None:
    extra = twins.dense | {"backbone.layers.0.mixer.out_proj.bias": torch.zeros(48)}
    with pytest.raises(CheckpointError, match=r"no place in this model, such as '.*out_proj\.bias'"):
        build_weights(extra, twins.config)


def test_tensors_beside_the_backbone_are_none_of_its_business(twins: Twins) -> None:
    build_weights(twins.dense | {"mtp.layers.0.norm.weight": torch.zeros(48)}, twins.config)
