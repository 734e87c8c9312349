"""Experts of many rows against their plain twin, and what a row's product must not depend on."""

import numpy as np
import pytest
import torch
from torch import Tensor

from common.hlwq.codebook import packing_codebook
from common.hlwq.matrix import raw_matrix
from common.hlwq.planes import PLANE_WIDTHS, RAW_BITS
from common.hlwq.quantize import pack_matrix
from common.model_config import ModelConfig
from common.record import ExpertBits, RecordLayout, record_layouts
from gpu_worker.cuda.kernels.grouped_product import GroupedExperts, _tile_size, grouped_products_plain
from tests.helpers.models import tiny_config
from tests.helpers.nemotron import relative_error

HIDDEN, INTERMEDIATE, K = 264, 72, 2
# A GPU rounds to bfloat16, the interpreter cuts.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3 if torch.cuda.is_available() else 1.5e-2}


def some_records(bits: ExpertBits, count: int, device: torch.device) -> tuple[RecordLayout, Tensor]:
    """Random experts, with rubbish where none of their matrices lie."""
    config = ModelConfig.from_dict(tiny_config(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE))
    layout = record_layouts(config, [bits] * config.num_layers)[0]
    records = torch.randint(256, (count, layout.size + 4096), dtype=torch.uint8)
    for record in records:
        for matrix in layout.matrices:
            weight, raw = torch.randn(matrix.out_features, matrix.in_features), matrix.bits == RAW_BITS
            packed = (
                raw_matrix(weight.bfloat16())
                if raw
                else pack_matrix(weight, matrix.bits, packing_codebook(matrix.bits))
            )
            matrix.store(packed, record)
    return layout, records.to(device)


def computed(layout: RecordLayout, x: Tensor, records: Tensor, counts: list[int], order: Tensor) -> Tensor:
    """Products of record i at the next counts[i] of the positions in `order`, NaN everywhere else."""
    products = torch.full((x.shape[0] * K, HIDDEN), torch.nan, device=x.device)
    addresses = [record.data_ptr() for record in records]
    experts = GroupedExperts(layout)
    experts(experts.prepare(x), addresses, spans_of(counts), order.to(x.device), K, products)
    return products


def spans_of(counts: list[int]) -> list[tuple[int, int]]:
    """The positions of some experts, one after another."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        *((ExpertBits(b, b), torch.float32) for b in PLANE_WIDTHS),
        (ExpertBits(16, 3), torch.float32),
        # Codes are decoded before anything is rounded to the activations' type.
        (ExpertBits(5, 5), torch.bfloat16),
        (ExpertBits(4, 16), torch.bfloat16),
    ],
    ids=str,
)
def test_experts_at_their_positions_alone(bits: ExpertBits, dtype: torch.dtype, device: torch.device) -> None:
    layout, records = some_records(bits, 2, device)
    x, counts = torch.randn(12, HIDDEN, device=device).to(dtype), [17, 3]
    order = torch.randperm(12 * K)
    products = computed(layout, x, records, counts, order)
    expected = torch.full_like(products, torch.nan)
    grouped_products_plain(x, layout, records, spans_of(counts), order.to(device), K, expected)
    written = ~expected.isnan()
    assert torch.equal(written, ~products.isnan())
    assert relative_error(products[written], expected[written]) < TOLERANCE[dtype]


def test_a_row_depends_on_nothing_beside_it(device: torch.device) -> None:
    """Not on its expert's other rows, the size of tile that these choose, nor where the record lies."""
    layout, records = some_records(ExpertBits(5, 4), 3, device)
    x, order = torch.randn(160, HIDDEN, device=device).bfloat16(), torch.randperm(160 * K)
    together = computed(layout, x, records[:2], [150, 70], order)
    records[2] = records[0]
    for count in (1, 16, 20, 50) if device.type == "cuda" else (20,):
        few = computed(layout, x, records[1:].flip(0), [count, 2], torch.cat([order[:count], order[150:]]))
        for positions in (order[:count], order[150:152]):
            alone, beside = few[positions.to(device)], together[positions.to(device)]
            # The interpreter's products are NumPy's, whose order of summing depends on their shape.
            assert (
                torch.equal(alone, beside) if device.type == "cuda" else relative_error(alone, beside) < 1e-4
            )


def test_sizes_of_tiles() -> None:
    """Many rows an expert take large tiles, few take small ones, float32 always."""
    assert _tile_size(np.full(128, 96), torch.bfloat16) >= 64
    assert _tile_size(np.full(128, 6), torch.bfloat16) == _tile_size(np.array([500]), torch.float32) == 16


def test_no_experts(device: torch.device) -> None:
    layout, records = some_records(ExpertBits(2, 2), 1, device)
    assert (
        computed(layout, torch.randn(1, HIDDEN, device=device), records[:0], [], torch.arange(2))
        .isnan()
        .all()
    )
