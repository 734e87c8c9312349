"""Rotated activations against their plain twins, and against the definition of a product."""

import pytest
import torch

from common.hlwq.codebook import packing_codebook
from common.hlwq.quantize import pack_matrix
from gpu_worker.cuda.kernels import rotation
from tests.helpers.nemotron import relative_error

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
# Few values are rounded to another neighbour than the twin's; the interpreter cuts instead of rounding.
TILE_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-4 if torch.cuda.is_available() else 8e-3}


@pytest.fixture(params=[(1, 128), (3, 200), (2, 2688)], ids=str)
def x(request: pytest.FixtureRequest, device: torch.device) -> torch.Tensor:
    return torch.randn(*request.param, generator=torch.Generator().manual_seed(1)).to(device)


def test_rotation_and_squared_relu(x: torch.Tensor) -> None:
    assert relative_error(rotation.rotate(x), rotation.rotate_plain(x)) < 2e-6
    assert relative_error(rotation.relu2_rotate(x), rotation.relu2_rotate_plain(x)) < 2e-6


def test_what_is_no_number_stays_none(device: torch.device) -> None:
    x = torch.ones(2, 256, device=device)
    x[1, 130] = torch.nan
    for found in (rotation.relu2_rotate(x), rotation.tile_rotate(x, torch.float32, squared_relu=True)):
        assert found.isnan().all(2).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("made_from", TOLERANCE, ids=str)
def test_rotation_for_tiles(x: torch.Tensor, made_from: torch.dtype, dtype: torch.dtype) -> None:
    found, expected = (f(x.to(made_from), dtype) for f in (rotation.tile_rotate, rotation.tile_rotate_plain))
    assert found.dtype == dtype and relative_error(found, expected) < TILE_TOLERANCE[dtype]


def test_squared_relu_for_tiles_of_rows_of_a_larger_tensor(device: torch.device) -> None:
    wide = torch.randn(70, 500, device=device)
    found = rotation.tile_rotate(wide[:, 7:140], torch.bfloat16, squared_relu=True)
    expected = rotation.tile_rotate_plain(wide[:, 7:140], torch.bfloat16, squared_relu=True)
    assert found.shape == (70, 2, 128) and relative_error(found, expected) < TILE_TOLERANCE[torch.bfloat16]


def test_rows_of_a_larger_tensor(device: torch.device) -> None:
    wide = torch.randn(3, 500, device=device)
    assert torch.equal(rotation.rotate(wide[:, 7:140]), rotation.rotate(wide[:, 7:140].contiguous()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm(x: torch.Tensor, dtype: torch.dtype) -> None:
    x, weight = x.to(dtype), torch.rand(x.shape[1], device=x.device).to(dtype) + 0.5
    found, expected = (f(x, weight, 1e-5) for f in (rotation.rms_norm_rotate, rotation.rms_norm_rotate_plain))
    assert relative_error(found[0], expected[0]) < TOLERANCE[dtype] / 2
    assert relative_error(found[1], expected[1]) < TOLERANCE[dtype]
    # What is rotated is what was rounded: both forms feed products of the same activations.
    assert relative_error(found[1], rotation.rotate_plain(found[0])) < 2e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("columns", "groups"), [(256, 8), (512, 2), (384, 3)])
def test_gated_norm(device: torch.device, columns: int, groups: int, dtype: torch.dtype) -> None:
    assert rotation.gated_norm_usable(columns, groups)
    x, projected = (
        torch.randn(2, columns, device=device).to(dtype),
        torch.randn(2, 3 * columns, device=device),
    )
    gate, weight = projected.to(dtype)[:, columns : 2 * columns], torch.rand(columns, device=device).to(dtype)
    arguments = (x, gate, weight, groups, 1e-5)
    found, expected = rotation.gated_norm_rotate(*arguments), rotation.gated_norm_rotate_plain(*arguments)
    assert relative_error(found[0], expected[0]) < TOLERANCE[dtype] / 2
    assert relative_error(found[1], rotation.rotate_plain(found[0])) < 2e-6


@pytest.mark.parametrize(("columns", "groups"), [(192, 1), (384, 1), (256, 3)])
def test_groups_that_cut_blocks_are_left_to_the_twin(columns: int, groups: int) -> None:
    assert not rotation.gated_norm_usable(columns, groups)


def test_what_is_rotated_gives_the_product(device: torch.device) -> None:
    """By hand: codes in the products' order, times norms, dotted with rotated activations."""
    matrix = pack_matrix(torch.randn(5, 200), 5, packing_codebook(5))
    x = torch.randn(2, 200)
    assert matrix.codebook is not None and matrix.norms is not None
    order = rotation.product_order(torch.device("cpu"))
    levels = matrix.codebook[matrix.codes().int()].view(5, -1, 128)[:, :, order]
    rotated = rotation.rotate(x.to(device)).cpu()
    y = torch.einsum("obc,rbc,ob->ro", levels, rotated, matrix.norms.float())
    assert relative_error(y, x @ matrix.decode().T) < 1e-5
