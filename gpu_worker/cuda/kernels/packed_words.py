"""One tile of a packed matrix times activations: what every product of few rows is made of.

A block of 128 codes is 16 words of eight codes, whatever the bits: word w holds those of columns 4 w + b and
64 + 4 w + b for b in 0..3, which is how the strided planes of `common.hlwq.planes` lie in 32-bit words. Each
is brought into two registers of four codes a byte: `even` for the lower columns, `odd` for the upper ones.

A codebook of up to 32 centroids is looked up by shuffles: lane l of a warp holds centroid l, and each `shfl`
looks up 32 weights. Gathers from the first-level cache ran at less than half of that speed, measured on an
H100 at 5 bits. Larger codebooks are gathered. Both find the same values; Triton's interpreter, which has no
inline assembly, always gathers. Not done here: what a program takes, and what becomes of its sums.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from common.hlwq.planes import PLANE_WIDTHS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as it is when kernels are defined

# Four look-ups and their products: $0 = $7 + sum of centroid(byte i of $1) * x_i for x_0..x_3 in $3..$6.
# $2 is the codebook. The compiler moves the load of this lane's centroid out of loops.
_FOUR_PRODUCTS = """{{
    .reg .u32 lane, code; .reg .u64 address; .reg .f32 centroid, weight, sum;
    mov.u32 lane, %laneid; and.b32 lane, lane, {last}; mad.wide.u32 address, lane, 4, $2;
    ld.global.nc.f32 centroid, [address];
    shfl.sync.idx.b32 weight, centroid, $1, 0x1f, 0xffffffff; fma.rn.f32 sum, weight, $3, $7;
    shr.u32 code, $1, 8; shfl.sync.idx.b32 weight, centroid, code, 0x1f, 0xffffffff;
    fma.rn.f32 sum, weight, $4, sum;
    shr.u32 code, $1, 16; shfl.sync.idx.b32 weight, centroid, code, 0x1f, 0xffffffff;
    fma.rn.f32 sum, weight, $5, sum;
    shr.u32 code, $1, 24; shfl.sync.idx.b32 weight, centroid, code, 0x1f, 0xffffffff;
    fma.rn.f32 $0, weight, $6, sum; }}"""
# Four look-ups: $0..$3 = centroids of the bytes of $4, $5 is the codebook.
_FOUR_CENTROIDS = """{{
    .reg .u32 lane, code; .reg .u64 address; .reg .f32 centroid;
    mov.u32 lane, %laneid; and.b32 lane, lane, {last}; mad.wide.u32 address, lane, 4, $5;
    ld.global.nc.f32 centroid, [address];
    shfl.sync.idx.b32 $0, centroid, $4, 0x1f, 0xffffffff;
    shr.u32 code, $4, 8; shfl.sync.idx.b32 $1, centroid, code, 0x1f, 0xffffffff;
    shr.u32 code, $4, 16; shfl.sync.idx.b32 $2, centroid, code, 0x1f, 0xffffffff;
    shr.u32 code, $4, 24; shfl.sync.idx.b32 $3, centroid, code, 0x1f, 0xffffffff; }}"""


def blocks_at_once(blocks: int) -> int:
    """How many of a matrix's blocks the tiles of a program span: eight, measured best on an H100."""
    return min(8, triton.next_power_of_2(blocks))


class LookUp:
    """How a codebook of `bits` is looked up: the constants of a kernel's launch."""

    def __init__(self, bits: int) -> None:
        assert bits in PLANE_WIDTHS
        self.bits = bits
        shuffled = bits <= 5 and not INTERPRETED
        last = (1 << bits) - 1  # lanes beyond a small codebook repeat it, so that none reads what follows it
        self.products = _FOUR_PRODUCTS.format(last=last) if shuffled else ""
        self.centroids = _FOUR_CENTROIDS.format(last=last) if shuffled else ""


@triton.jit
def _plane_words(
    plane, row, block, word, valid, WORDS: tl.constexpr, BLOCKS: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """Of a plane with WORDS words a block, the one that word `word` has fields in: shape of row x word."""
    place = word // 16 * WORDS + word % 16 % WORDS
    # Four neighbours are one access of 16 bytes, which the compiler cannot see through the remainder.
    if len(place.shape) == 2:
        place = tl.max_contiguous(tl.multiple_of(place, [1, 4]), [1, 4])
    else:
        place = tl.max_contiguous(tl.multiple_of(place, [1, 1, 4]), [1, 1, 4])
    # A row may lie 2 GB into a large matrix; within it, 32 bits are enough.
    pointers = plane + row.to(tl.int64) * (BLOCKS * WORDS) + (block * WORDS + place)
    if FULL:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=valid, other=0, eviction_policy="evict_first")


@triton.jit
def code_words(
    low, high, row, block, word, valid, BITS: tl.constexpr, BLOCKS: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """Codes of four columns a register, as (even, odd): row (outs, 1), word (1, words), valid like both.

    `word` counts from the first word of block `block`, 16 a block, and may reach over several blocks. FULL:
    every word is valid, so that nothing has to be masked.
    """
    if BITS == 8:
        even = _plane_words(low, row, block, word, valid, 32, BLOCKS, FULL)
        odd = _plane_words(low + 16, row, block, word, valid, 32, BLOCKS, FULL)
    elif BITS <= 3:
        fields = _plane_words(low, row, block, word, valid, 8, BLOCKS, FULL) >> (word // 8 % 2 * 2)
        even, odd = fields & 0x03030303, (fields >> 4) & 0x03030303
    else:
        nibbles = _plane_words(low, row, block, word, valid, 16, BLOCKS, FULL)
        even, odd = nibbles & 0x0F0F0F0F, (nibbles >> 4) & 0x0F0F0F0F
    if BITS == 3:
        bit = _plane_words(high, row, block, word, valid, 4, BLOCKS, FULL) >> (word // 4 % 4)
        even, odd = even | ((bit << 2) & 0x04040404), odd | ((bit >> 2) & 0x04040404)
    elif BITS == 5:
        bit = _plane_words(high, row, block, word, valid, 4, BLOCKS, FULL) >> (word // 4 % 4)
        even, odd = even | ((bit << 4) & 0x10101010), odd | (bit & 0x10101010)
    elif BITS == 6:
        pair = _plane_words(high, row, block, word, valid, 8, BLOCKS, FULL) >> (word // 8 % 2 * 2)
        even, odd = even | ((pair << 4) & 0x30303030), odd | (pair & 0x30303030)
    return even, odd


@triton.jit
def four_centroids(codes, codebook, ASSEMBLY: tl.constexpr):
    """The centroids of the bytes of `codes`, lowest first."""
    if ASSEMBLY != "":
        table = tl.zeros_like(codes).to(tl.int64) + codebook.to(tl.int64)
        a, b, c, d = tl.inline_asm_elementwise(
            ASSEMBLY, "=f,=f,=f,=f,r,l", [codes, table],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a, b = tl.load(codebook + (codes & 255)), tl.load(codebook + ((codes >> 8) & 255))
        c, d = tl.load(codebook + ((codes >> 16) & 255)), tl.load(codebook + ((codes >> 24) & 255))
    return a, b, c, d


@triton.jit
def _four_products(codes, codebook, x0, x1, x2, x3, total, ASSEMBLY: tl.constexpr):
    """total + the centroids of the bytes of `codes` times x0..x3. In one piece of assembly, so that centroids
    need no registers beyond their product."""
    if ASSEMBLY != "":
        table = tl.zeros_like(codes).to(tl.int64) + codebook.to(tl.int64)
        return tl.inline_asm_elementwise(
            ASSEMBLY, "=f,r,l,f,f,f,f,f", [codes, table, x0, x1, x2, x3, total],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    a, b, c, d = four_centroids(codes, codebook, "")
    return total + a * x0 + b * x1 + c * x2 + d * x3


@triton.jit
def _read(pointers, valid, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointers)
    return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def activations(x, block, word, valid, FIELD: tl.constexpr, FULL: tl.constexpr):
    """Field FIELD of eight of each word's activations, which lie in the products' order; x: row or rows."""
    return _read(x + block * 128 + word // 16 * 128 + FIELD * 16 + word % 16, valid, FULL)


@triton.jit
def block_norms(norms, row, block, word, valid, BLOCKS: tl.constexpr, FULL: tl.constexpr):
    """The norm that each word's weights are scaled by."""
    return _read(norms + row.to(tl.int64) * BLOCKS + (block + word // 16), valid, FULL).to(tl.float32)


@triton.jit
def tile_products(
    low, high, norms, codebook, x, row, block, word, BITS: tl.constexpr, BLOCKS: tl.constexpr,
    ASSEMBLY: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Sums over the eight codes of each word, scaled by their block's norm: float32 (outs, words).

    low, high: planes as int32 pointers (high is unused where bits have one plane); norms float16; x float32
    pointer to one row of rotated activations; row (outs, 1), word (1, words) from block `block` on. Words
    beyond the last block count 0; FULL says that there are none.
    """
    spread = word + row * 0  # every row of the tile reads the same activations: the compiler merges them
    valid = block + spread // 16 < BLOCKS
    even, odd = code_words(low, high, row, block, spread, valid, BITS, BLOCKS, FULL)
    sums = _four_products(
        even, codebook,
        activations(x, block, spread, valid, 0, FULL), activations(x, block, spread, valid, 2, FULL),
        activations(x, block, spread, valid, 4, FULL), activations(x, block, spread, valid, 6, FULL),
        tl.zeros_like(even).to(tl.float32), ASSEMBLY,
    )  # fmt: skip
    sums = _four_products(
        odd, codebook,
        activations(x, block, spread, valid, 1, FULL), activations(x, block, spread, valid, 3, FULL),
        activations(x, block, spread, valid, 5, FULL), activations(x, block, spread, valid, 7, FULL),
        sums, ASSEMBLY,
    )  # fmt: skip
    return sums * block_norms(norms, row, block, spread, valid, BLOCKS, FULL)
