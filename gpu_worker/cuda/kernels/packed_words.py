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

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as it is when kernels are defined
BARE_BFLOAT16 = tl.constexpr(INTERPRETED)  # the interpreter keeps it as bits, which it would multiply

# $0 = this lane's centroid of the codebook at $1; lanes beyond the last code, $2, repeat smaller codebooks,
# so that none reads what follows them. The second form is for a codebook that may be written while the kernel
# runs: it keeps off the cache of what never changes.
_LANE_CENTROID = tl.constexpr("""{
    .reg .u32 lane; .reg .u64 address;
    mov.u32 lane, %laneid; and.b32 lane, lane, $2; mad.wide.u32 address, lane, 4, $1;
    ld.global.nc.f32 $0, [address]; }""")
_LANE_CENTROID_NOW = tl.constexpr(_LANE_CENTROID.value.replace(".nc", ""))
# Four look-ups and their products: $0 = $7 + sum of centroid(byte i of $1) * x_i for x_0..x_3 in $3..$6, $2
# being the lane's centroid.
_FOUR_PRODUCTS = tl.constexpr("""{
    .reg .u32 code; .reg .f32 weight, sum;
    shfl.sync.idx.b32 weight, $2, $1, 0x1f, 0xffffffff; fma.rn.f32 sum, weight, $3, $7;
    shr.u32 code, $1, 8; shfl.sync.idx.b32 weight, $2, code, 0x1f, 0xffffffff;
    fma.rn.f32 sum, weight, $4, sum;
    shr.u32 code, $1, 16; shfl.sync.idx.b32 weight, $2, code, 0x1f, 0xffffffff;
    fma.rn.f32 sum, weight, $5, sum;
    shr.u32 code, $1, 24; shfl.sync.idx.b32 weight, $2, code, 0x1f, 0xffffffff;
    fma.rn.f32 $0, weight, $6, sum; }""")
# Four look-ups: $0..$3 = centroids of the bytes of $4, $5 being the lane's centroid.
_FOUR_CENTROIDS = tl.constexpr("""{
    .reg .u32 code;
    shfl.sync.idx.b32 $0, $5, $4, 0x1f, 0xffffffff;
    shr.u32 code, $4, 8; shfl.sync.idx.b32 $1, $5, code, 0x1f, 0xffffffff;
    shr.u32 code, $4, 16; shfl.sync.idx.b32 $2, $5, code, 0x1f, 0xffffffff;
    shr.u32 code, $4, 24; shfl.sync.idx.b32 $3, $5, code, 0x1f, 0xffffffff; }""")


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


@triton.constexpr_function
def shuffled(bits):
    """Whether codes of so many bits are looked up by shuffles."""
    return bits <= 5 and not INTERPRETED


@triton.jit
def _merged(lower, upper, LOWER: tl.constexpr, UPPER: tl.constexpr, LOOSE: tl.constexpr):
    """Codes of two planes' fields; LOOSE: in one operation, with rubbish above UPPER."""
    return (lower & LOWER) | (upper & (~LOWER if LOOSE else UPPER))


@triton.jit
def raw_words(
    low, high, row, block, word, valid, BITS: tl.constexpr, BLOCKS: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """The words that codes are in, as `codes_of` takes them: row (outs, 1), word (1, words), valid like both.

    `word` counts from the first word of block `block`, 16 a block, and may reach over several blocks. FULL:
    every word is valid, so that nothing has to be masked.
    """
    if BITS == 8:
        first = _plane_words(low, row, block, word, valid, 32, BLOCKS, FULL)
        second = _plane_words(low + 16, row, block, word, valid, 32, BLOCKS, FULL)
    elif BITS <= 3:
        first = _plane_words(low, row, block, word, valid, 8, BLOCKS, FULL)
    else:
        first = _plane_words(low, row, block, word, valid, 16, BLOCKS, FULL)
    if BITS == 3 or BITS == 5:
        second = _plane_words(high, row, block, word, valid, 4, BLOCKS, FULL)
    elif BITS == 6:
        second = _plane_words(high, row, block, word, valid, 8, BLOCKS, FULL)
    elif BITS != 8:
        second = first
    return first, second


@triton.jit
def codes_of(first, second, word, BITS: tl.constexpr):
    """Codes of four columns a register, as (even, odd), from `raw_words`.

    Those that are looked up by shuffles may have anything in the rest of their bytes: shuffles take 5 bits,
    and lanes repeat smaller codebooks.
    """
    LOOSE: tl.constexpr = shuffled(BITS)
    even, odd = first, second
    if BITS <= 3:
        even = first >> (word // 8 % 2 * 2)
    if BITS != 8:
        odd = even >> 4
    if BITS == 3:
        bit = second >> (word // 4 % 4)
        even = _merged(even, bit << 2, 0x03030303, 0x04040404, LOOSE)
        odd = _merged(odd, bit >> 2, 0x03030303, 0x04040404, LOOSE)
    elif BITS == 5:
        bit = second >> (word // 4 % 4)
        even = _merged(even, bit << 4, 0x0F0F0F0F, 0x10101010, LOOSE)
        odd = _merged(odd, bit, 0x0F0F0F0F, 0x10101010, LOOSE)
    elif BITS == 6:
        pair = second >> (word // 8 % 2 * 2)
        even = _merged(even, pair << 4, 0x0F0F0F0F, 0x30303030, False)
        odd = _merged(odd, pair, 0x0F0F0F0F, 0x30303030, False)
    elif BITS <= 4 and not LOOSE:
        even, odd = even & ((1 << BITS) - 1) * 0x01010101, odd & ((1 << BITS) - 1) * 0x01010101
    return even, odd


@triton.jit
def centroid_table(codebook, codes, BITS: tl.constexpr, FIXED: tl.constexpr = True):
    """What codes of this shape are looked up in: each lane's own centroid, or the codebook itself.

    FIXED: it was there when the kernel began. Else its address must be known only once it is there.
    """
    if shuffled(BITS):
        address = tl.zeros_like(codes).to(tl.int64) + codebook.to(tl.int64)
        return tl.inline_asm_elementwise(
            _LANE_CENTROID if FIXED else _LANE_CENTROID_NOW, "=f,l,r",
            [address, tl.full(codes.shape, (1 << BITS) - 1, tl.int32)],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # noqa: RET505, the compiler wants both branches
        return codebook


@triton.jit
def four_centroids(codes, table, BITS: tl.constexpr):
    """The centroids of the bytes of `codes`, lowest first."""
    if shuffled(BITS):
        a, b, c, d = tl.inline_asm_elementwise(
            _FOUR_CENTROIDS, "=f,=f,=f,=f,r,f", [codes, table],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a, b = tl.load(table + (codes & 255)), tl.load(table + ((codes >> 8) & 255))
        c, d = tl.load(table + ((codes >> 16) & 255)), tl.load(table + ((codes >> 24) & 255))
    return a, b, c, d


@triton.jit
def four_products(codes, table, x0, x1, x2, x3, total, BITS: tl.constexpr):
    """total + the centroids of the bytes of `codes` times x0..x3. In one piece of assembly, so that centroids
    need no registers beyond their product."""
    if shuffled(BITS):
        return tl.inline_asm_elementwise(
            _FOUR_PRODUCTS, "=f,r,f,f,f,f,f,f", [codes, table, x0, x1, x2, x3, total],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    a, b, c, d = four_centroids(codes, table, BITS)
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
def block_norms(norms, row, block, four, valid, BLOCKS: tl.constexpr, FULL: tl.constexpr):
    """The norm that each four words' weights are scaled by: `four` counts them from block `block` on."""
    return _read(norms + row.to(tl.int64) * BLOCKS + (block + four // 4), valid, FULL)


@triton.jit
def tile_row(OUTS: tl.constexpr):
    """Which of a tile's OUTS outputs each row that `tile_centroids` loads is: see there."""
    row = tl.arange(0, OUTS)
    return row % 8 + row // (OUTS // 2) * 8 + row // 8 % (OUTS // 16) * 16


@triton.jit
def tile_centroids(
    low, high, codebook, row, block, BITS: tl.constexpr, BLOCKS: tl.constexpr, OUTS: tl.constexpr
):  # fmt: skip
    """One block of OUTS outputs for tensor cores: float32 (OUTS, 128), columns in the tiles' order.

    row (OUTS, 1): the rows to load, in the order of `tile_row`. In a warp's product of 16 outputs by 16
    columns, lane 4 g + t holds outputs g and g + 8, columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. A load of 16
    bytes gives it words 4 t to 4 t + 3 of one row, and a second load those of another. So the words are said
    to be those columns and the rows to be those outputs, and nothing has to move between lanes. That takes
    OUTS / 16 warps; others give the same numbers.
    """
    word = tl.arange(0, 16)[None, :]
    first, second = raw_words(low, high, row, block, word, word < 16, BITS, BLOCKS, True)
    even, odd = codes_of(first, second, word, BITS)
    table = centroid_table(codebook, even, BITS)
    a, c, e, g = four_centroids(even, table, BITS)
    b, d, f, h = four_centroids(odd, table, BITS)
    fields = tl.join(
        tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
    )  # (rows, words, 2, 2, 2), the last three being the bits of a field's number
    bits = tl.reshape(fields, [2, OUTS // 16, 8, 4, 2, 2, 2, 2, 2])
    return tl.reshape(tl.permute(bits, (1, 0, 2, 6, 7, 8, 4, 3, 5)), [OUTS, 128])


@triton.jit
def tile_dot(a, b, total):
    """total + a b, for operands of one type: exact products, sums in float32."""
    if BARE_BFLOAT16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
