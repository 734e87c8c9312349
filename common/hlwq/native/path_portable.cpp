// The path for any processor: 16 lanes of the compiler's vector extension, centroids looked up one by one.
#include <cstdint>

#include "path.h"

namespace hlwq {
namespace {

constexpr int kLanes = 16;
constexpr int kFewRows = 1;  // none: look-ups take long here, and a tile does them once for all rows
constexpr int kChains = 4;
constexpr int kPanelRows = 3, kPanelOuts = 4;
typedef float Vec __attribute__((vector_size(64)));

inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

inline float half_to_float(uint16_t half) {  // finite values
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
    uint32_t bits = (magnitude << 13) + (112u << 23);
    if (magnitude < 0x400) {  // subnormal: steps of 2^-24
        const float value = float(magnitude) * 5.9604644775390625e-08f;
        __builtin_memcpy(&bits, &value, 4);
    }
    bits |= sign;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

template <int BITS>
constexpr int position(int code) {
    return code;
}

// One field of a plane: code i of a block, for planes of WIDTH bits.
template <int WIDTH>
inline int field(const uint8_t* plane, int i) {
    if constexpr (WIDTH == 0) return 0;
    else return plane[i % (16 * WIDTH)] >> (i / (16 * WIDTH) * WIDTH) & ((1 << WIDTH) - 1);
}

template <int BITS, bool SPLIT>
struct Lookup {
    static constexpr int kLow = BITS == 3 ? 2 : BITS == 5 || BITS == 6 ? 4 : BITS, kHigh = BITS - kLow;
    const float* codebook;

    explicit Lookup(const float* centroids) : codebook(centroids) {}

    void weights(const uint8_t* low, const uint8_t* high, int group, Vec w[4]) const {
        for (int i = 0; i < 4 * kLanes; i++) {
            const int code = field<kLow>(low, group + i) | field<kHigh>(high, group + i) << kLow;
            w[i / kLanes][i % kLanes] = codebook[code];
        }
    }
};

inline void raw_weights(const uint16_t* source, Vec w[4]) {
    for (int i = 0; i < 4 * kLanes; i++) {
        const uint32_t bits = uint32_t(source[i]) << 16;
        float value;
        __builtin_memcpy(&value, &bits, 4);
        w[i / kLanes][i % kLanes] = value;
    }
}

inline void keep(Vec&) {}
inline void pin(Vec&) {}

#include "path.inc"

}  // namespace

const Path kPortable = {"portable", stride, prepare, product, hadamard, quantize, decode, nullptr, nullptr};

}  // namespace hlwq
