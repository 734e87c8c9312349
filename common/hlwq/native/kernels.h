// The C interface of the native kernels: raw pointers in, raw pointers out, no allocation that a caller sees.
// Layouts are those of common/record.py and common/hlwq/planes.py. Every function may be called from any thread;
// work is spread over the pool of pool.h. Nothing here checks its arguments: the Python side does. What returns
// int32_t returns 0 where memory ran out, and then what it writes may be anything, unless something else is said.
#pragma once
#include <cstdint>

extern "C" {

// Where one matrix lies, as offsets from the start of its record. `bits` 16 means raw bfloat16: one plane, no
// norms, no codebook. `planes` are those of the widths of common.hlwq.planes.PLANE_WIDTHS[bits], low bits first.
struct HlwqLayout {
    int64_t bits, out_features, in_features;
    int64_t planes[2], norms, codebook;
};

// The element types of weights that are read or written.
enum HlwqType : int32_t { HLWQ_FLOAT32 = 0, HLWQ_BFLOAT16 = 1, HLWQ_FLOAT16 = 2 };

// "avx512", "avx2" or "portable": the path that runs on this machine.
const char* hlwq_path();
// Limit the choice to one path by name, for tests; returns 0 when this machine lacks it.
int32_t hlwq_set_path(const char* name);
void hlwq_set_threads(int32_t threads);
int32_t hlwq_threads();  // never 0

// codes (rows, columns) uint8 to planes and back; columns a multiple of 128.
void hlwq_pack(const uint8_t* codes, int64_t rows, int64_t columns, int64_t bits, uint8_t* const* planes);
void hlwq_unpack(const uint8_t* const* planes, int64_t rows, int64_t columns, int64_t bits, uint8_t* codes);

// Codes of 1 to 8 bits out of one run of bits, 8 codes in `bits` bytes: `groups` such eights, least or most
// significant bit first (the published packed layouts).
void hlwq_unpack_run(const uint8_t* run, int64_t groups, int64_t bits, int32_t most_significant_first, uint8_t* codes);

// The same codes, of `width` bits, of whole blocks, to planes of `bits` bits: none may be out of their range.
void hlwq_repack_run(const uint8_t* run, int64_t blocks, int64_t width, int32_t most_significant_first, int64_t bits,
                     uint8_t* const* planes);

// H applied to each block of 128 of x, in place.
void hlwq_hadamard(float* x, int64_t blocks);

// How values become codes: NearestCentroid of quantize.py. `thresholds` (levels - 1) are the values above which
// the next code holds; `lowest` and `above` are the lowest code of a cell of a uniform grid, and the threshold in it.
struct HlwqGrid {
    const float *codebook, *thresholds;
    const uint8_t* lowest;
    const float* above;
    float origin, inverse_cell;
    int32_t last_cell, bits;
};

// W (rows, columns) to codes (rows, padded) and norms float16 (rows, padded / 128), as quantize.py defines them:
// with `count` shares the norms are fitted, with none they are ||w||. Returns 0 when a weight is not finite or a
// norm exceeds float16.
int32_t hlwq_quantize(const void* weights, int32_t type, int64_t rows, int64_t columns, const HlwqGrid* grid,
                      const float* shares, int32_t count, uint8_t* codes, uint16_t* norms);

// W' (out, in), trimmed, rounded once to `type` (float32 or bfloat16).
void hlwq_decode(const HlwqLayout* layout, const uint8_t* record, int32_t type, void* weights);

// y (rows, out) = x W'^T for x (rows, in), both float32. A row's result does not depend on its neighbours.
int32_t hlwq_product(const HlwqLayout* layout, const uint8_t* record, const float* x, int64_t rows, float* y);

// For expert e of `experts` and each of its pairs p (flat positions row * k + rank, grouped by expert, those of e
// at pairs[starts[e]] .. pairs[starts[e + 1]]): products[p] = down(relu(up(x[p / k]))^2), float32 (., hidden).
int32_t hlwq_experts(const HlwqLayout* up, const HlwqLayout* down, const uint8_t* const* records, int64_t experts,
                     const int64_t* starts, const int64_t* pairs, int64_t k, const float* x, float* products);

// products[i] (hidden) = down(relu(up(x))^2) of each of `count` packed experts, bit for bit as a GPU worker's kernels
// compute it. x is one row as they have it: rotated, in the products' order, whole blocks (device_order.inc). Both
// matrices at most 24 blocks wide, not raw.
int32_t hlwq_device_experts(const HlwqLayout* up, const HlwqLayout* down, const uint8_t* const* records,
                            int64_t count, const float* x, float* const* products);

// sums[row] = sum over ranks, in their order, of weights[row * k + rank] * products[row * k + rank].
void hlwq_combine(const float* products, const float* weights, int64_t rows, int64_t k, int64_t hidden, float* sums);
}
