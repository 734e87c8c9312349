// What one instruction set offers to dispatch.cpp: the functions that path.inc defines once for each of them.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace hlwq {

// Activations of one product, as a path wants them: rotated, padded, reordered, `stride` floats a row.
struct Path {
    const char* name;
    int64_t (*stride)(const HlwqLayout& layout);
    // x (in_features) to one prepared row; `squared` takes relu(x)^2 first.
    void (*prepare)(const HlwqLayout& layout, const float* x, bool squared, float* prepared);
    // Output features [first, last) of y[r] for `rows` prepared rows.
    void (*product)(const HlwqLayout& layout, const uint8_t* record, const float* const* prepared, int64_t rows,
                    int64_t first, int64_t last, float* const* y);
    void (*hadamard)(float* block);
    bool (*quantize)(const void* weights, int32_t type, int64_t columns, const HlwqGrid& grid, const float* shares,
                     int32_t count, uint8_t* codes, uint16_t* norms);
    void (*decode)(const HlwqLayout& layout, const uint8_t* record, int64_t row, int32_t type, void* weights);
    // As device_order.inc defines them: y[first] to y[last - 1] of one row x in the products' order; and relu(inner)^2,
    // `in_features` floats, to whole blocks in that order. For packed matrices of up to 24 blocks a row.
    // Null on the portable path, which is slower than any link.
    void (*device_product)(const HlwqLayout& layout, const uint8_t* record, const float* x, int64_t first, int64_t last,
                           float* y);
    void (*device_activations)(const float* inner, int64_t in_features, float* prepared);
};

extern const Path kPortable, kAvx2, kAvx512;

const Path& path();  // the one in use

}  // namespace hlwq
