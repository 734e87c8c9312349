"""Experts computed from slots against their plain twins, which decode them."""

import pytest
import torch

from common.hlwq.codebook import packing_codebook
from common.hlwq.matrix import raw_matrix
from common.hlwq.planes import PLANE_WIDTHS, RAW_BITS
from common.hlwq.quantize import pack_matrix
from common.record import MatrixLayout, matrix_layout
from gpu_worker.cuda.kernels.expert_products import (
    ExpertProducts,
    Products,
    combine,
    combine_plain,
    expert_products_plain,
)
from gpu_worker.cuda.kernels.rotation import rotate
from tests.helpers.nemotron import relative_error

SLOTS = 5


def slot_pool(outs: int, columns: int, bits: int, device: torch.device) -> tuple[MatrixLayout, torch.Tensor]:
    """Random matrices in every slot, with rubbish where no matrix lies."""
    layout, size = matrix_layout("weight", outs, columns, bits)
    pool = torch.randint(256, (SLOTS, size + 4096), dtype=torch.uint8)
    for record in pool:
        weight = torch.randn(outs, columns)
        raw = bits == RAW_BITS
        layout.store(
            raw_matrix(weight.bfloat16()) if raw else pack_matrix(weight, bits, packing_codebook(bits)),
            record,
        )
    return layout, pool.to(device)


@pytest.mark.parametrize(("bits", "k"), [*((bits, 3) for bits in (*PLANE_WIDTHS, RAW_BITS)), (5, 1)])
def test_pairs_read_their_slots(bits: int, k: int, device: torch.device) -> None:
    layout, pool = slot_pool(14, 264, bits, device)
    x = torch.randn(2, 264, device=device)
    x = x if bits == RAW_BITS else rotate(x)
    slot_ids = torch.tensor([4, 0, 4, 2, 1, 3][: 2 * k], dtype=torch.int32, device=device)
    found = ExpertProducts(layout)(x, pool, slot_ids, k)
    assert relative_error(found, expert_products_plain(x, layout, pool, slot_ids, k)) < 1e-6


def test_a_pair_does_not_depend_on_its_slot_nor_on_other_pairs(device: torch.device) -> None:
    layout, pool = slot_pool(9, 256, 5, device)
    x, products = rotate(torch.randn(3, 256, device=device)), ExpertProducts(layout)
    pool[3] = pool[1]
    together = products(x, pool, torch.tensor([1, 0, 2, 4, 3, 1], dtype=torch.int32, device=device), 2)
    for pair, slot in enumerate([3, 0, 2, 4, 1, 3]):
        alone = products(x[pair // 2 :][:1], pool, torch.tensor([slot], dtype=torch.int32, device=device), 1)
        assert torch.equal(alone[0], together[pair])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "k", "hidden"), [(1, 6, 2688), (3, 2, 130)])
def test_combine(rows: int, k: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    products, weights = torch.randn(rows * k, hidden, device=device), torch.rand(rows, k, device=device)
    shared, residual = (torch.randn(rows, hidden, device=device).to(dtype) for _ in range(2))
    expected = combine_plain(Products(products), weights, shared, residual)
    assert combine(Products(products), weights, shared, residual) is residual
    assert relative_error(residual, expected) < (1e-6 if dtype is torch.float32 else 5e-3)
