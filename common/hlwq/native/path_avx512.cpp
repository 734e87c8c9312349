// The AVX-512 path (F, BW, VL, DQ). A codebook of up to 32 centroids is two registers, and one permute looks up 16
// weights, exactly. Larger ones are looked up as 16 bits, 32 weights at once: 64 take two registers, 256 eight.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "path.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

namespace hlwq {
namespace {

constexpr int kLanes = 16;
constexpr int kFewRows = 1;  // none: look-ups are short here, and a tile does them once for all rows
constexpr int kChains = 1;  // the blocks of an output overlap well enough, and memory likes one stream
constexpr int kPanelRows = 6, kPanelOuts = 4;  // 24 sums, six activations and a weight, of 32 registers
typedef float Vec __attribute__((vector_size(64)));

[[gnu::always_inline]] inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

[[gnu::always_inline]] inline float half_to_float(uint16_t half) { return _cvtsh_ss(half); }

// Of 64 consecutive codes, each lane holds four, one a byte, up to 5 bits. Beyond, words hold those of even and of odd
// number, and a word's half of a lane alternates; raw weights are words already.
template <int BITS>
constexpr int position(int code) {
    if (BITS == 16) return (code / 32 * 2 + code % 2) * kLanes + code % 32 / 2;
    if (BITS <= 5) return code % 4 * kLanes + code / 4;
    return (code % 2 * 2 + code / 2 % 2) * kLanes + code / 4;
}

[[gnu::always_inline]] inline __m512i per_lane(int64_t a, int64_t b, int64_t c, int64_t d) {
    const int64_t each = 0x0001000100010001;
    return _mm512_set_epi64(d * each, d * each, c * each, c * each, b * each, b * each, a * each, a * each);
}

// Shifts the words of the four 128-bit lanes left by a, b, c and d, or right where these are negative.
[[gnu::always_inline]] inline __m512i shift_lanes(__m512i words, int a, int b, int c, int d) {
    if (d >= 0) return _mm512_sllv_epi16(words, per_lane(a, b, c, d));
    if (a <= 0) return _mm512_srlv_epi16(words, per_lane(-a, -b, -c, -d));
    return _mm512_srli_epi16(_mm512_sllv_epi16(words, per_lane(a - d, b - d, c - d, 0)), unsigned(-d));
}

// A plane of width 2: byte i holds the fields of codes i, i + 32, i + 64 and i + 96. The fields of 64 codes, each
// shifted to bit `to` of its byte; other bits are rubbish.
[[gnu::always_inline]] inline __m512i quarters(const uint8_t* plane, int group, int to) {
    const __m512i bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)plane));
    const int a = to - (group ? 4 : 0), b = to - (group ? 6 : 2);
    return shift_lanes(bytes, a, a, b, b);
}

// A plane of width 1: byte i holds the fields of codes i, i + 16, ..., i + 112.
[[gnu::always_inline]] inline __m512i eighths(const uint8_t* plane, int group, int to) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)plane));
    const int a = to - (group ? 4 : 0);
    return shift_lanes(bytes, a, a - 1, a - 2, a - 3);
}

// The bits of `mask` in every byte from `low`, the others from `high`.
[[gnu::always_inline]] inline __m512i merge(__m512i low, __m512i high, int mask) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(char(mask)), low, high, 0xca);
}

// 64 consecutive codes, the first or the second half of a block, one a byte. Bits above the code's are left as
// they come: look-ups do not see them.
template <int BITS>
[[gnu::always_inline]] inline __m512i codes(const uint8_t* low, const uint8_t* high, int group) {
    if constexpr (BITS == 8) return _mm512_loadu_si512(low + group);
    if constexpr (BITS == 2) return quarters(low, group, 0);
    if constexpr (BITS == 3) return merge(quarters(low, group, 0), eighths(high, group, 2), 3);
    if constexpr (BITS == 4 || BITS == 5 || BITS == 6) {
        const __m512i nibbles = _mm512_loadu_si512(low), fields = group ? _mm512_srli_epi16(nibbles, 4) : nibbles;
        if constexpr (BITS == 4) return fields;
        if constexpr (BITS == 5) return merge(fields, eighths(high, group, 4), 15);
        if constexpr (BITS == 6) return merge(fields, quarters(high, group, 4), 15);
    }
}

// 32 centroids, looked up by the low 5 bits of each lane of an index; fewer are repeated.
struct FloatTable {
    __m512 lower, upper;

    FloatTable(const float* centroids, int count) {
        alignas(64) float repeated[32];
        for (int i = 0; i < 32; i++) repeated[i] = centroids[i % count];
        lower = _mm512_load_ps(repeated), upper = _mm512_load_ps(repeated + 16);
    }

    [[gnu::always_inline]] __m512 operator()(__m512i index) const {
        return _mm512_permutex2var_ps(lower, index, upper);
    }
};

// 2**BITS words in registers, looked up by the low BITS bits of each word of an index.
template <int BITS>
struct Table {
    static constexpr int kRegisters = 1 << (BITS - 5);
    __m512i words[kRegisters];

    explicit Table(const uint16_t* values) {
        for (int i = 0; i < kRegisters; i++) words[i] = _mm512_loadu_si512(values + 32 * i);
    }

    [[gnu::always_inline]] __m512i operator()(__m512i index) const {
        if constexpr (BITS == 6) return _mm512_permutex2var_epi16(words[0], index, words[1]);
        if constexpr (BITS == 8) {
            const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
            const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
            __m512i quarter[4];
            for (int i = 0; i < 4; i++) quarter[i] = _mm512_permutex2var_epi16(words[2 * i], index, words[2 * i + 1]);
            const __m512i lower = _mm512_mask_mov_epi16(quarter[0], bit6, quarter[1]);
            return _mm512_mask_mov_epi16(lower, bit7, _mm512_mask_mov_epi16(quarter[2], bit6, quarter[3]));
        }
    }
};

[[gnu::always_inline]] inline Vec low_words(__m512i words) { return (Vec)_mm512_slli_epi32(words, 16); }

[[gnu::always_inline]] inline Vec high_words(__m512i words) {
    return (Vec)_mm512_and_si512(words, _mm512_set1_epi32(int32_t(0xffff0000)));
}

// Centroids split into bfloat16 parts: the upper digits, and what is left of them.
template <int BITS>
struct Halves {
    uint16_t upper[1 << BITS], lower[1 << BITS];

    explicit Halves(const float* centroids) {
        for (int i = 0; i < 1 << BITS; i++) {
            upper[i] = round(centroids[i]);
            const uint32_t bits = uint32_t(upper[i]) << 16;
            float rounded;
            __builtin_memcpy(&rounded, &bits, 4);
            lower[i] = round(centroids[i] - rounded);
        }
    }

    static uint16_t round(float value) {
        uint32_t bits;
        __builtin_memcpy(&bits, &value, 4);
        return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

template <int BITS, bool SPLIT>
struct LookupOfHalves {
    Table<BITS> upper, lower;

    explicit LookupOfHalves(const float* centroids) : LookupOfHalves(Halves<BITS>(centroids)) {}
    explicit LookupOfHalves(const Halves<BITS>& halves) : upper(halves.upper), lower(halves.lower) {}

    [[gnu::always_inline]] void weights(const uint8_t* low, const uint8_t* high, int group, Vec w[4]) const {
        const __m512i even = codes<BITS>(low, high, group), odd = _mm512_srli_epi16(even, 8);
        // The upper byte of a word of `even` is the odd code: 8-bit look-ups mask it by which bits they test.
        const __m512i evens = upper(even), odds = upper(odd);
        w[0] = low_words(evens), w[1] = high_words(evens), w[2] = low_words(odds), w[3] = high_words(odds);
        if constexpr (SPLIT) {
            const __m512i even_rest = lower(even), odd_rest = lower(odd);
            w[0] += low_words(even_rest), w[1] += high_words(even_rest);
            w[2] += low_words(odd_rest), w[3] += high_words(odd_rest);
        }
    }
};

// Lane i of Vec b: the centroid of code 4 i + b. Up to 5 bits all products look up so.
template <int BITS, bool SPLIT>
struct WordLookup {
    FloatTable table;

    explicit WordLookup(const float* centroids) : table(centroids, 1 << BITS) {}

    [[gnu::always_inline]] void weights(const uint8_t* low, const uint8_t* high, int group, Vec w[4]) const {
        const __m512i bytes = codes<BITS>(low, high, group);
        for (int b = 0; b < 4; b++) w[b] = (Vec)table(_mm512_srli_epi32(bytes, 8 * b));
    }
};

template <bool SPLIT>
struct WordLookup<6, SPLIT> {
    FloatTable lower, upper;

    explicit WordLookup(const float* centroids) : lower(centroids, 32), upper(centroids + 32, 32) {}

    [[gnu::always_inline]] void weights(const uint8_t* low, const uint8_t* high, int group, Vec w[4]) const {
        const __m512i bytes = codes<6>(low, high, group);
        for (int b = 0; b < 4; b++) {
            const __m512i index = _mm512_srli_epi32(bytes, 8 * b);
            const __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
            w[b] = (Vec)_mm512_mask_mov_ps(lower(index), bit5, upper(index));
        }
    }
};

template <bool SPLIT>
struct WordLookup<8, SPLIT> {
    const float* codebook;

    explicit WordLookup(const float* centroids) : codebook(centroids) {}

    [[gnu::always_inline]] void weights(const uint8_t* low, const uint8_t* high, int group, Vec w[4]) const {
        const __m512i bytes = codes<8>(low, high, group);
        for (int b = 0; b < 4; b++) {
            const __m512i index = _mm512_and_si512(_mm512_srli_epi32(bytes, 8 * b), _mm512_set1_epi32(255));
            w[b] = (Vec)_mm512_i32gather_ps(index, codebook, 4);
        }
    }
};

template <int BITS, bool SPLIT>
struct Lookup : WordLookup<BITS, SPLIT> {
    using WordLookup<BITS, SPLIT>::WordLookup;
};

template <bool SPLIT>
struct Lookup<6, SPLIT> : LookupOfHalves<6, SPLIT> {
    using LookupOfHalves<6, SPLIT>::LookupOfHalves;
};

template <bool SPLIT>
struct Lookup<8, SPLIT> : LookupOfHalves<8, SPLIT> {
    using LookupOfHalves<8, SPLIT>::LookupOfHalves;
};

[[gnu::always_inline]] inline Vec four_norms(const uint16_t* halves) {
    return (Vec)_mm512_broadcast_f32x4(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)halves)));
}

[[gnu::always_inline]] inline void raw_weights(const uint16_t* source, Vec w[4]) {
    for (int i = 0; i < 2; i++) {
        const __m512i words = _mm512_loadu_si512(source + 32 * i);
        w[2 * i] = low_words(words), w[2 * i + 1] = high_words(words);
    }
}

// Makes the compiler hold a value in a register where it would load it again for every use.
[[gnu::always_inline]] inline void keep(Vec& value) { asm("" : "+v"(value)); }

// Also, in the order in which such values are computed.
[[gnu::always_inline]] inline void pin(Vec& value) { asm volatile("" : "+v"(value)); }

#define HLWQ_SMALL_NEAREST "nearest_avx512.inc"
#include "path.inc"
#include "device_order.inc"

}  // namespace

extern const Path kAvx512 = {
    "avx512", stride, prepare, product, hadamard, quantize, decode, device_product, device_activations};

}  // namespace hlwq

#pragma GCC pop_options
#endif
