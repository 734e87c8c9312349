"""Activations as products with packed weights want them: rotated block by block, in the products' order.

A packed matrix is never rotated back: y = sum over blocks of norm * codebook[code] . (H x) / sqrt(128)
(common/hlwq/matrix.py). Rotating is fused with what makes the activations: a norm, an activation function.
Both factors 1 / sqrt(128), that of H and this one, are in what is stored. Codes are read by words of eight
(`packed_words`), so the columns of a block stand in the order in which the eight codes of its words are met;
tensor cores want another order, and the compute dtype. Not done here: products.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from common.hlwq.hadamard import hadamard_matrix, hadamard_transform
from common.hlwq.planes import BLOCK, padded
from gpu_worker.cuda.kernels.overlap import overlapping, wait_for_inputs
from gpu_worker.cuda.kernels.packed_words import INTERPRETED, tile_dot
from gpu_worker.model.norms import gated_group_norm
from gpu_worker.model.norms import rms_norm as plain_rms_norm

ROUNDED = tl.constexpr(INTERPRETED)  # the interpreter rounds every operation, and has no assembly


@cache
def product_order(device: torch.device) -> Tensor:
    """The columns of a block in the products' order: (128,) int64.

    Word w of 16 holds the codes of columns 4 w + b and, in the upper halves of its bytes, 64 + 4 w + b, for b
    in 0..3; place (2 b + h) 16 + w is column 64 h + 4 w + b.
    """
    place = torch.arange(BLOCK, device=device)
    field, word = place // 16, place % 16
    return 64 * (field % 2) + 4 * word + field // 2


@cache
def tile_order(device: torch.device) -> Tensor:
    """The columns of a block as `packed_words.tile_centroids` has them: (128,) int64.

    The products' order, but for the sixteen words of each field, of which word 4 t + 2 u + v is at place
    8 u + 2 t + v.
    """
    place = torch.arange(BLOCK, device=device)
    word = place // 2 % 4 * 4 + place // 8 % 2 * 2 + place % 2
    return product_order(device)[place // 16 * 16 + word]


def rotate_plain(x: Tensor) -> Tensor:
    """x (rows, columns) to (rows, blocks, 128) float32, rotated, scaled and in the products' order."""
    aligned = F.pad(x.float(), (0, padded(x.shape[1]) - x.shape[1]))
    blocks = hadamard_transform(aligned).view(x.shape[0], -1, BLOCK) * BLOCK**-0.5
    return blocks[:, :, product_order(x.device)]


def rms_norm_rotate_plain(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of x (rows, columns), in x.dtype, and that rotated."""
    normed = plain_rms_norm(x, weight, epsilon)
    return normed, rotate_plain(normed)


def tile_rotate_plain(x: Tensor, dtype: torch.dtype, squared_relu: bool = False) -> Tensor:
    """x, or relu(x) squared, to (rows, blocks, 128) in `dtype`, rotated, scaled and in the tiles' order."""
    values = torch.relu(x.float()).square() if squared_relu else x.float()
    aligned = F.pad(values, (0, padded(x.shape[1]) - x.shape[1]))
    blocks = hadamard_transform(aligned).view(x.shape[0], -1, BLOCK) * BLOCK**-0.5
    return blocks[:, :, tile_order(x.device)].to(dtype)


def relu2_rotate_plain(x: Tensor) -> Tensor:
    """relu(x) squared, rotated, for x (rows, columns) float32."""
    return rotate_plain(torch.relu(x).square())


def gated_norm_rotate_plain(
    x: Tensor, gate: Tensor, weight: Tensor, groups: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Mamba-2's gated group norm of x (rows, columns) under gate, in x.dtype, and that rotated."""
    normed = gated_group_norm(x, gate, weight, groups, epsilon)
    return normed, rotate_plain(normed)


def rotate(x: Tensor) -> Tensor:
    """As `rotate_plain`; x may have any stride between rows."""
    return _rotated(x, squared_relu=False)


def relu2_rotate(x: Tensor) -> Tensor:
    """As `relu2_rotate_plain`; x may have any stride between rows."""
    return _rotated(x, squared_relu=True)


def tile_rotate(x: Tensor, dtype: torch.dtype, squared_relu: bool = False) -> Tensor:
    """As `tile_rotate_plain`, for many rows, in bfloat16 or float32; x may have any stride between rows."""
    (rows, columns), blocks = x.shape, padded(x.shape[1]) // BLOCK
    y = torch.empty(rows, blocks, BLOCK, dtype=dtype, device=x.device)
    # Without tensor cores each product of a tile is an instruction of its own.
    size = 64 if dtype is torch.bfloat16 else 16
    # Operands that bfloat16 does not hold are split in two, which leaves an error of 2^-17.
    split = x.dtype is torch.float32 and dtype is torch.bfloat16
    _tile_rotate_kernel[(blocks, triton.cdiv(rows, size))](
        x, _tile_signs(dtype, x.device), y, rows, columns, x.stride(0), blocks * BLOCK,
        SQUARED_RELU=squared_relu, SPLIT=split, ROWS=size,
    )  # fmt: skip
    return y


@cache
def _tile_signs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """H, not normalised, its columns in the tiles' order: (128, 128)."""
    return hadamard_matrix().sign().to(device, dtype)[:, tile_order(device)].contiguous()


def rms_norm_rotate(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm_rotate_plain`, for contiguous x."""
    rows, columns = x.shape
    normed, y = torch.empty_like(x), _rotated_like(x)
    width = triton.next_power_of_2(columns)
    grid, arguments = (rows, y.shape[1]), (x, weight, normed, y, columns, epsilon, y.stride(0))
    _norm_kernel[grid](*arguments, WIDTH=width, num_warps=1, **overlapping())
    return normed, y


def gated_norm_usable(columns: int, groups: int) -> bool:
    """Whether `gated_norm_rotate` can do it: groups are whole blocks, or blocks whole groups."""
    size = columns // groups
    return columns % BLOCK == 0 and (size % BLOCK == 0 or BLOCK % size == 0) and size & (size - 1) == 0


def gated_norm_rotate(
    x: Tensor, gate: Tensor, weight: Tensor, groups: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """As `gated_norm_rotate_plain`, where `gated_norm_usable`; gate may have any stride between rows."""
    rows, columns = x.shape
    normed, y = torch.empty_like(x), _rotated_like(x)
    _gated_norm_kernel[(rows, y.shape[1])](
        x,
        gate,
        weight,
        normed,
        y,
        columns,
        gate.stride(0),
        epsilon,
        y.stride(0),
        GROUP=columns // groups,
        num_warps=1,
        **overlapping(),
    )
    return normed, y


def _rotated(x: Tensor, squared_relu: bool) -> Tensor:
    (rows, columns), y = x.shape, _rotated_like(x)
    _rotate_kernel[(rows, y.shape[1])](
        x, y, columns, x.stride(0), y.stride(0), SQUARED_RELU=squared_relu, num_warps=1, **overlapping()
    )
    return y


def _rotated_like(x: Tensor) -> Tensor:
    rows, columns = x.shape
    return torch.empty(rows, padded(columns) // BLOCK, BLOCK, dtype=torch.float32, device=x.device)


@triton.jit
def _store_rotated(block, y):
    """H block / 128 for block (128,) float32, to y in the products' order."""
    # Each stage takes one bit of the column, lowest first, and puts it in front: after seven all are back. An
    # addition has one rounding, so this has the same bits however a compiler places it, and on a CPU.
    for _ in tl.static_range(7):
        a, b = tl.split(tl.reshape(block, [64, 2]))
        block = tl.reshape(tl.permute(tl.join(a + b, a - b), (1, 0)), [128])
    column = tl.arange(0, 128)
    place = (2 * (column % 4) + column // 64) * 16 + column % 64 // 4
    tl.store(y + place, block * (1 / 128))


@triton.jit
def _relu(values):
    """That of a NaN is one: a maximum would hide it from whoever looks whether logits are numbers."""
    return tl.where(values <= 0.0, 0.0, values)


@triton.jit
def _squared(values):
    """Rounded before anything is added to it, which the compiler would fuse otherwise."""
    if ROUNDED:
        return values * values
    return tl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _rotate_kernel(x, y, columns, x_stride, y_stride, SQUARED_RELU: tl.constexpr, OVERLAP: tl.constexpr):
    wait_for_inputs(OVERLAP)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * 128 + tl.arange(0, 128)
    values = tl.load(x + row * x_stride + column, mask=column < columns, other=0.0).to(tl.float32)
    if SQUARED_RELU:
        values = _squared(_relu(values))
    _store_rotated(values, y + row * y_stride + block * 128)


@triton.jit
def _tile_rotate_kernel(
    x, signs, y, rows, columns, x_stride, y_stride, SQUARED_RELU: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    place, inside, row = tl.arange(0, 128), row < rows, row.to(tl.int64)
    column = block * 128 + place[None, :]
    values = tl.load(x + row * x_stride + column, mask=inside & (column < columns), other=0.0)
    if SQUARED_RELU:
        values = _relu(values)
        values = values * values
    h = tl.load(signs + place[:, None] * 128 + place[None, :])
    high = values.to(h.dtype)
    rotated = tile_dot(high, h, tl.zeros([ROWS, 128], tl.float32))
    if SPLIT:
        rotated = tile_dot((values - high.to(tl.float32)).to(h.dtype), h, rotated)
    tl.store(y + row * y_stride + column, (rotated * (1 / 128)).to(h.dtype), mask=inside)


@triton.jit
def _norm_kernel(
    x, weight, normed, y, columns, epsilon, y_stride, WIDTH: tl.constexpr, OVERLAP: tl.constexpr
):
    wait_for_inputs(OVERLAP)
    # Every program of a row computes the row's mean square again: one launch less, and a row is small.
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    whole = tl.arange(0, WIDTH)
    values = tl.load(x + row * columns + whole, mask=whole < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / columns + epsilon)
    column = block * 128 + tl.arange(0, 128)
    inside = column < columns
    mine = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    rounded = (gain * (mine * scale)).to(normed.dtype.element_ty)
    tl.store(normed + row * columns + column, rounded, mask=inside)
    _store_rotated(rounded.to(tl.float32), y + row * y_stride + block * 128)


@triton.jit
def _gated(x, gate):
    g = gate.to(tl.float32)
    return x.to(tl.float32) * (g * tl.sigmoid(g))


@triton.jit
def _gated_norm_kernel(
    x,
    gate,
    weight,
    normed,
    y,
    columns,
    gate_stride,
    epsilon,
    y_stride,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_inputs(OVERLAP)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_row, gate_row = x + row * columns, gate + row * gate_stride
    column = block * 128 + tl.arange(0, 128)
    mine = _gated(tl.load(x_row + column), tl.load(gate_row + column))
    if GROUP >= 128:  # the block lies in one group, of which it reads the rest as well
        whole = block * 128 // GROUP * GROUP + tl.arange(0, GROUP)
        values = _gated(tl.load(x_row + whole), tl.load(gate_row + whole))
        scale = tl.rsqrt(tl.sum(values * values, 0) / GROUP + epsilon)
        scaled = mine * scale
    else:
        groups = tl.reshape(mine, [128 // GROUP, GROUP])
        scales = tl.rsqrt(tl.sum(groups * groups, 1) / GROUP + epsilon)
        scaled = tl.reshape(groups * scales[:, None], [128])
    # transformers' order of rounding: to the compute dtype, then times the weight, and rounded again.
    dtype: tl.constexpr = normed.dtype.element_ty
    rounded = (tl.load(weight + column).to(tl.float32) * scaled.to(dtype).to(tl.float32)).to(dtype)
    tl.store(normed + row * columns + column, rounded)
    _store_rotated(rounded.to(tl.float32), y + row * y_stride + block * 128)
