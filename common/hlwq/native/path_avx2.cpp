// The AVX2 path (with FMA and F16C). Up to 32 centroids are looked up as upper and lower bytes of 16 bits, by byte
// shuffles of 16 entries each; larger codebooks are gathered from memory.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "path.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace hlwq {
namespace {

constexpr int kLanes = 8;
constexpr int kFewRows = 8;  // as many sums fit the registers beside what looks up
constexpr int kChains = 4;
constexpr int kPanelRows = 3, kPanelOuts = 4;  // twelve sums, three activations and a weight: all registers
typedef float Vec __attribute__((vector_size(32)));

[[gnu::always_inline]] inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

[[gnu::always_inline]] inline float half_to_float(uint16_t half) { return _cvtsh_ss(half); }

// Of 32 consecutive codes: interleaving bytes works within halves of a register, and a word's half of a lane
// alternates. Gathered centroids come in order.
template <int BITS>
constexpr int position(int code) {
    if (BITS == 16) return (code / 16 * 2 + code % 2) * kLanes + code % 16 / 2;
    if (BITS > 5) return code;
    const int half = code / 16, within = code % 16;
    return (within / 8 * 2 + within % 2) * kLanes + half * 4 + within % 8 / 2;
}

// 32 consecutive codes of a block, from code `group` on, one a byte.
template <int WIDTH>
[[gnu::always_inline]] inline __m256i fields(const uint8_t* plane, int group) {
    if constexpr (WIDTH == 8) return _mm256_loadu_si256((const __m256i*)(plane + group));
    if constexpr (WIDTH == 4) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i*)(plane + group % 64));
        return _mm256_and_si256(group < 64 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
    }
    if constexpr (WIDTH == 2) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i*)plane);
        return _mm256_and_si256(_mm256_srl_epi16(bytes, _mm_cvtsi32_si128(group / 32 * 2)), _mm256_set1_epi8(3));
    }
    if constexpr (WIDTH == 1) {
        const __m128i bytes = _mm_srl_epi16(_mm_loadu_si128((const __m128i*)plane), _mm_cvtsi32_si128(group / 16));
        return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 1), bytes), _mm256_set1_epi8(1));
    }
}

template <int BITS>
[[gnu::always_inline]] inline __m256i codes(const uint8_t* low, const uint8_t* high, int group) {
    if constexpr (BITS == 5) return _mm256_or_si256(fields<4>(low, group), _mm256_slli_epi16(fields<1>(high, group), 4));
    if constexpr (BITS == 6) return _mm256_or_si256(fields<4>(low, group), _mm256_slli_epi16(fields<2>(high, group), 4));
    if constexpr (BITS == 3) return _mm256_or_si256(fields<2>(low, group), _mm256_slli_epi16(fields<1>(high, group), 2));
    if constexpr (BITS == 2 || BITS == 4 || BITS == 8) return fields<BITS>(low, group);
}

// How 32 codes are looked up: bytes below 16, and for 5 bits the fifth in the top bit of each byte of `bit4`, where a
// blend looks at it. Other bits of that are rubbish, which saves masking and merging.
struct Index {
    __m256i codes, bit4;
};

template <int BITS>
[[gnu::always_inline]] inline Index index_of(const uint8_t* low, const uint8_t* high, int group) {
    if constexpr (BITS != 5) return {codes<BITS>(low, high, group), _mm256_setzero_si256()};
    // Bytes of a plane of width 1 hold the fields of every 16th code: the same bytes serve both halves of a register.
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)high));
    const int a = 7 - group / 16, b = a - 1;
    return {fields<4>(low, group), _mm256_sllv_epi32(bytes, _mm256_set_epi32(b, b, b, b, a, a, a, a))};
}

// Bytes of `high` where the top bit of `mask` is set. For the intrinsic GCC compares the mask with zero first, which
// costs an instruction and a register.
[[gnu::always_inline]] inline __m256i blend(__m256i low, __m256i high, __m256i mask) {
    __m256i chosen;
    asm("vpblendvb %3, %2, %1, %0" : "=x"(chosen) : "x"(low), "x"(high), "x"(mask));
    return chosen;
}

// Up to 32 bytes, looked up by an index of BITS bits.
template <int BITS>
struct ByteTable {
    __m256i first, second;

    explicit ByteTable(const uint8_t* values) {
        uint8_t padded[32] = {};
        for (int i = 0; i < 1 << BITS; i++) padded[i] = values[i];
        first = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)padded));
        second = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(padded + 16)));
    }

    [[gnu::always_inline]] __m256i operator()(Index index) const {
        const __m256i lower = _mm256_shuffle_epi8(first, index.codes);
        if constexpr (BITS < 5) return lower;
        return blend(lower, _mm256_shuffle_epi8(second, index.codes), index.bit4);
    }
};

// Centroids rounded to bfloat16, as two tables of bytes.
template <int BITS>
struct WordTable {
    ByteTable<BITS> lower, upper;

    explicit WordTable(const float* centroids) : WordTable(Bytes(centroids)) {}

    [[gnu::always_inline]] void operator()(Index index, Vec w[4]) const {
        const __m256i low = lower(index), high = upper(index), mask = _mm256_set1_epi32(int32_t(0xffff0000));
        const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
        w[0] = (Vec)_mm256_slli_epi32(first, 16), w[1] = (Vec)_mm256_and_si256(first, mask);
        w[2] = (Vec)_mm256_slli_epi32(second, 16), w[3] = (Vec)_mm256_and_si256(second, mask);
    }

   private:
    struct Bytes {
        uint8_t lower[1 << BITS], upper[1 << BITS];

        explicit Bytes(const float* centroids) {
            for (int i = 0; i < 1 << BITS; i++) {
                uint32_t bits;
                __builtin_memcpy(&bits, centroids + i, 4);
                bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
                lower[i] = uint8_t(bits), upper[i] = uint8_t(bits >> 8);
            }
        }
    };
    explicit WordTable(const Bytes& bytes) : lower(bytes.lower), upper(bytes.upper) {}
};

template <int BITS>
struct Rest {  // what rounding to bfloat16 leaves of each centroid
    float values[1 << BITS];

    explicit Rest(const float* centroids) {
        for (int i = 0; i < 1 << BITS; i++) {
            uint32_t bits;
            __builtin_memcpy(&bits, centroids + i, 4);
            bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
            float rounded;
            __builtin_memcpy(&rounded, &bits, 4);
            values[i] = centroids[i] - rounded;
        }
    }
};

template <int BITS, bool SPLIT>
struct Lookup {
    WordTable<BITS> upper, lower;

    explicit Lookup(const float* centroids) : upper(centroids), lower(Rest<BITS>(centroids).values) {}

    [[gnu::always_inline]] void weights(const uint8_t* low, const uint8_t* high, int group, Vec w[4]) const {
        const Index index = index_of<BITS>(low, high, group);
        upper(index, w);
        if constexpr (SPLIT) {
            Vec rest[4];
            lower(index, rest);
            for (int i = 0; i < 4; i++) w[i] += rest[i];
        }
    }
};

template <int BITS>
struct Gather {
    const float* codebook;

    explicit Gather(const float* centroids) : codebook(centroids) {}

    [[gnu::always_inline]] void weights(const uint8_t* low, const uint8_t* high, int group, Vec w[4]) const {
        alignas(32) uint8_t bytes[32];
        _mm256_store_si256((__m256i*)bytes, codes<BITS>(low, high, group));
        for (int i = 0; i < 4; i++) {
            const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(bytes + 8 * i)));
            w[i] = (Vec)_mm256_i32gather_ps(codebook, index, 4);
        }
    }
};

template <bool SPLIT>
struct Lookup<6, SPLIT> : Gather<6> {
    using Gather<6>::Gather;
};

template <bool SPLIT>
struct Lookup<8, SPLIT> : Gather<8> {
    using Gather<8>::Gather;
};

// Half of the bits of each centroid, as floats that bfloat16 holds.
template <int BITS>
struct HalfOfBits {
    float values[1 << BITS];

    HalfOfBits(const float* centroids, bool upper) {
        for (int i = 0; i < 1 << BITS; i++) {
            uint32_t bits;
            __builtin_memcpy(&bits, centroids + i, 4);
            bits = upper ? bits & 0xffff0000 : bits << 16;
            __builtin_memcpy(values + i, &bits, 4);
        }
    }
};

template <int BITS, bool SPLIT>
struct WordLookup {
    WordTable<BITS> upper, lower;

    explicit WordLookup(const float* centroids)
        : upper(HalfOfBits<BITS>(centroids, true).values), lower(HalfOfBits<BITS>(centroids, false).values) {}

    [[gnu::always_inline]] void weights(const uint8_t* low, const uint8_t* high, int group, Vec w[4]) const {
        // Interleaved, bytes 2 i and 2 i + 1 of each 16 end in lane i of the first two Vecs, others in the last two.
        const __m256i order = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
        Index index = index_of<BITS>(low, high, group);
        index.codes = _mm256_shuffle_epi8(index.codes, order);
        if constexpr (BITS == 5) index.bit4 = _mm256_shuffle_epi8(index.bit4, order);
        upper(index, w);
        if constexpr (SPLIT) {
            Vec rest[4];
            lower(index, rest);
            for (int i = 0; i < 4; i++)
                w[i] = (Vec)_mm256_or_si256((__m256i)w[i], _mm256_srli_epi32((__m256i)rest[i], 16));
        }
    }
};

template <int BITS>
struct WordGather {
    const float* codebook;

    explicit WordGather(const float* centroids) : codebook(centroids) {}

    [[gnu::always_inline]] void weights(const uint8_t* low, const uint8_t* high, int group, Vec w[4]) const {
        const __m256i bytes = codes<BITS>(low, high, group), mask = _mm256_set1_epi32(255);
        for (int b = 0; b < 4; b++) {
            const __m256i index = _mm256_and_si256(_mm256_srli_epi32(bytes, 8 * b), mask);
            w[b] = (Vec)_mm256_i32gather_ps(codebook, index, 4);
        }
    }
};

template <bool SPLIT>
struct WordLookup<6, SPLIT> : WordGather<6> {
    using WordGather<6>::WordGather;
};

template <bool SPLIT>
struct WordLookup<8, SPLIT> : WordGather<8> {
    using WordGather<8>::WordGather;
};

[[gnu::always_inline]] inline Vec four_norms(const uint16_t* halves) {
    const __m128 four = _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)halves));
    return (Vec)_mm256_set_m128(four, four);
}

[[gnu::always_inline]] inline void raw_weights(const uint16_t* source, Vec w[4]) {
    for (int i = 0; i < 2; i++) {
        const __m256i words = _mm256_loadu_si256((const __m256i*)(source + 16 * i));
        w[2 * i] = (Vec)_mm256_slli_epi32(words, 16);
        w[2 * i + 1] = (Vec)_mm256_and_si256(words, _mm256_set1_epi32(int32_t(0xffff0000)));
    }
}

// As in path_avx512.cpp.
[[gnu::always_inline]] inline void keep(Vec& value) { asm("" : "+x"(value)); }
[[gnu::always_inline]] inline void pin(Vec& value) { asm volatile("" : "+x"(value)); }

#define HLWQ_SMALL_NEAREST "nearest_avx2.inc"
#include "path.inc"
#include "device_order.inc"

}  // namespace

extern const Path kAvx2 = {
    "avx2", stride, prepare, product, hadamard, quantize, decode, device_product, device_activations};

}  // namespace hlwq

#pragma GCC pop_options
#endif
