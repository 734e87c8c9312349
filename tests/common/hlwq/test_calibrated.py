"""Calibrated codes against GPTQ as its paper writes it down, and against plain codes on new inputs."""

import math

import pytest
import torch
from torch import Tensor

from common.errors import CheckpointError
from common.hlwq.calibrated import Moment, error_feedback, pack_calibrated, quantize_calibrated
from common.hlwq.codebook import packing_codebook
from common.hlwq.hadamard import hadamard_matrix
from common.hlwq.quantize import pack_matrix, quantize


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(count: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated inputs, as layers see them: few directions hold most of their energy."""
    mixing = normal(columns, columns, seed=99) * torch.logspace(0, -2, columns)
    return normal(count, columns, seed=seed) @ mixing.T


def feedback_of(x: Tensor) -> Tensor:
    feedback = error_feedback(Moment.of(x))
    assert feedback is not None
    return feedback


def rotation(columns: int) -> Tensor:
    """H on every block of 128, float64."""
    return torch.block_diag(*[hadamard_matrix().double()] * (columns // 128))


def test_feedback_factors_the_damped_moment() -> None:
    x = inputs(50, 200)
    feedback = feedback_of(x).double()
    assert torch.equal(feedback, feedback.triu()) and bool((feedback.diagonal() == 1).all())
    moment = x.double().T @ x.double()
    damping = torch.full((256,), 0.01 * float(moment.diagonal().mean()), dtype=torch.float64)
    damping[:200] = (0.3 + 0.2 * 200 / 50) * float(moment.diagonal().mean())
    full = torch.diag(damping)
    full[:200, :200] += moment
    inverse = torch.linalg.inv(feedback)
    diagonal = inverse @ (rotation(256) @ full @ rotation(256)) @ inverse.T
    off_diagonal = diagonal - torch.diag(diagonal.diagonal())
    assert float(off_diagonal.abs().max()) < 1e-5 * float(diagonal.diagonal().max())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])
def test_inputs_must_have_squares(value: float) -> None:
    x = inputs(50, 200)
    x[7, 9] = value
    with pytest.raises(CheckpointError, match="too large, or not finite"):
        error_feedback(Moment.of(x))


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_those_of_gptq(bits: int) -> None:
    """arXiv:2210.17323, equations 2 and 3, without blocking and without Cholesky: update all later weights by
    the inverse Hessian after each column, then take the column out of the inverse by Gaussian elimination."""
    weight, x, codebook = normal(24, 256, seed=1) * 0.02, inputs(500, 256), packing_codebook(bits)
    codes, norms = quantize_calibrated(weight, codebook, feedback_of(x))
    mean = float((x.double() ** 2).sum()) / 256
    damped = x.double().T @ x.double() + (0.3 + 0.2 * 256 / 500) * mean * torch.eye(256, dtype=torch.float64)
    inverse = torch.linalg.inv(rotation(256) @ damped @ rotation(256))
    rest = weight.double() @ rotation(256)
    scales = (norms.double() / math.sqrt(128)).repeat_interleave(128, dim=1)
    expected = torch.zeros(24, 256, dtype=torch.uint8)
    for j in range(256):
        distances = (rest[:, j, None] - codebook.double() * scales[:, j, None]).abs()
        expected[:, j] = distances.argmin(dim=1).to(torch.uint8)
        error = rest[:, j] - codebook.double()[expected[:, j].long()] * scales[:, j]
        rest -= error[:, None] * inverse[j] / inverse[j, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1  # used up: whatever is not 0 will do
    # float32 against float64: a value between two levels may go either way, and then its row differs.
    assert float((codes == expected).all(dim=1).float().mean()) > 0.9


@pytest.mark.parametrize(("bits", "gain"), [(3, 0.62), (5, 0.62), (8, 0.65)])
def test_outputs_err_less_on_new_inputs(bits: int, gain: float) -> None:
    weight, codebook, unseen = normal(96, 300) * 0.02, packing_codebook(bits), inputs(500, 300, seed=7)
    calibrated = pack_calibrated(weight, bits, codebook, feedback_of(inputs(600, 300))).decode()
    plain = pack_matrix(weight, bits, codebook, fit_norms=True).decode()
    errors = [float((unseen @ (decoded - weight).T).norm()) for decoded in (calibrated, plain)]
    assert errors[0] < gain * errors[1]


def test_few_inputs_do_little_harm() -> None:
    """Four inputs for 256 columns: what they say is mostly noise, and damping must hold it down."""
    weight, codebook, unseen = normal(96, 256) * 0.02, packing_codebook(4), normal(500, 256, seed=7)
    calibrated = pack_calibrated(weight, 4, codebook, feedback_of(normal(4, 256))).decode()
    plain = pack_matrix(weight, 4, codebook, fit_norms=True).decode()
    errors = [float((unseen @ (decoded - weight).T).norm()) for decoded in (calibrated, plain)]
    assert errors[0] < 1.05 * errors[1]


def test_uncorrelated_inputs_give_plain_rounding() -> None:
    weight, codebook = normal(16, 256) * 0.02, packing_codebook(5)
    codes, norms = quantize_calibrated(weight, codebook, torch.eye(256))
    plain_codes, plain_norms = quantize(weight, codebook, fit_norms=True)
    assert torch.equal(norms, plain_norms)
    assert (
        float((codes == plain_codes).float().mean()) > 0.99
    )  # fitting moves norms a little after choosing codes


def test_rows_do_not_depend_on_each_other() -> None:
    weight, codebook, feedback = normal(40, 256) * 0.02, packing_codebook(5), feedback_of(inputs(300, 256))
    whole = quantize_calibrated(weight, codebook, feedback)[0]
    parts = [quantize_calibrated(rows, codebook, feedback)[0] for rows in weight.split(17)]
    assert float((torch.cat(parts) == whole).float().mean()) > 0.999


def test_zero_blocks_stay_zero() -> None:
    weight = normal(3, 300) * 0.02
    weight[1, 128:256], weight[2] = 0, 0
    packed = pack_calibrated(weight, 4, packing_codebook(4), feedback_of(inputs(400, 300)))
    decoded = packed.decode()
    assert bool((decoded[1, 128:256] == 0).all()) and bool((decoded[2] == 0).all())
    assert bool(torch.isfinite(decoded).all()) and set(packed.codes()[2].tolist()) == {7}  # the level below 0


def test_inputs_never_seen_say_nothing() -> None:
    assert error_feedback(Moment(torch.zeros(8, 8), 0)) is None
    assert error_feedback(Moment.of(torch.zeros(5, 8))) is None


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = normal(4, 128)
    weight[2, 5] = math.inf
    with pytest.raises(CheckpointError, match="finite"):
        quantize_calibrated(weight, packing_codebook(5), torch.eye(128))
