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
from gpu_worker.cuda.kernels.lane import HANDED_OVER
from gpu_worker.cuda.kernels.orders import AHEAD, Coming, chunks_of, copy, no_orders
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


@pytest.mark.parametrize("bits", [5, 6, RAW_BITS])
def test_each_product_waits_for_its_own_record(bits: int, device: torch.device) -> None:
    """Two records are there, one of them by a guess; two are on their way when the products begin; one pair
    was handed over. Before they come, their slots hold numbers that would spoil every sum."""
    on_gpu = device.type == "cuda"
    outs, columns = (1024, 1024) if on_gpu else (40, 256)
    layout, records = slot_pool(outs, columns, bits, torch.device("cpu"))
    stride = -(-records.shape[1] // 4096) * 4096
    arena = torch.zeros(SLOTS, stride, dtype=torch.uint8, pin_memory=on_gpu)
    arena[:, : records.shape[1]] = records
    base, rubbish = torch.tensor([arena.data_ptr()], device=device), torch.full((1, stride), 255)
    x = torch.randn(1, columns, device=device)
    x = x if bits == RAW_BITS else rotate(x)
    slot_ids = torch.tensor([4, 0, HANDED_OVER.value, 2, 1], dtype=torch.int32, device=device)
    plain = expert_products_plain(x, layout, arena.to(device), slot_ids, 5)
    products = ExpertProducts(layout)
    for _ in range(30 if on_gpu else 1):
        orders = no_orders(2, 5, device)
        for order, slot in ((0, 0), (AHEAD + 1, 4), (AHEAD + 2, 2)):
            orders.frame[1, order] = orders.slot[1, order] = slot
            orders.due[1, order] = chunks_of(stride)
            orders.claimed[1, order] = 0
        orders.claimed[1, 0] = orders.done[1, 0] = chunks_of(stride)
        pool = arena.to(device)[None].repeat(2, 1, 1)
        pool[1, [2, 4]] = rubbish.to(device, torch.uint8)
        copy(range(1, 2), orders, base, pool, wait=True, programs=1)
        found = products(x, pool[1], slot_ids, 5, coming=Coming(orders, 1))
        there = slot_ids >= 0
        assert relative_error(found[there], plain[there]) < 1e-6
        assert torch.equal(orders.done, orders.due)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "k", "hidden"), [(1, 6, 2688), (3, 2, 130)])
def test_combine(rows: int, k: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    products, weights = torch.randn(rows * k, hidden, device=device), torch.rand(rows, k, device=device)
    shared, residual = (torch.randn(rows, hidden, device=device).to(dtype) for _ in range(2))
    expected = combine_plain(Products(products), weights, shared, residual)
    assert combine(Products(products), weights, shared, residual) is residual
    assert relative_error(residual, expected) < (1e-6 if dtype is torch.float32 else 5e-3)
