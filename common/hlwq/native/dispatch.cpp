// The C interface: chooses a path once, cuts work into pieces for the pool. The arithmetic is in path.inc.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "path.h"
#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace hlwq {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kOutputs = 32;  // output features in a piece of work, of one row at least: some tens of microseconds

const Path* find_path(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;  // older compilers do not know F16C by name
    const bool half = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    const bool avx2 = half && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && (!name || !std::strcmp(name, "avx512"))) return &kAvx512;
    if (avx2 && (!name || !std::strcmp(name, "avx2"))) return &kAvx2;
#endif
    return !name || !std::strcmp(name, "portable") ? &kPortable : nullptr;
}

std::atomic<const Path*> chosen{nullptr};

// Calls body(first, last) for the pieces of [0, count).
template <class Body>
void pieces(int64_t count, int64_t size, const Body& body) {
    parallel_for((count + size - 1) / size, [&](int64_t i) { body(i * size, std::min(count, (i + 1) * size)); });
}

int64_t padded(int64_t columns) { return (columns + kBlock - 1) / kBlock * kBlock; }

// Rows of floats, each at a multiple of 64 bytes, that hold nothing yet. Their stride is an odd number of blocks, or
// nearly: blocks a multiple of a page apart would compete for the same few places of the L1 cache.
class Rows {
   public:
    Rows(int64_t rows, int64_t columns)
        : stride_((columns + 15) / 16 * 16 + (columns / kBlock % 2 ? 0 : kBlock)),
          memory_(new float[rows * stride_ + 16]) {
        start_ = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64 / 4;
    }
    float* operator[](int64_t row) { return start_ + row * stride_; }

   private:
    int64_t stride_;
    std::unique_ptr<float[]> memory_;
    float* start_;
};

// ---- Codes in planes and in runs of bits, by plain vectors of bytes, which every processor has.

typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Bytes load(const uint8_t* p) {
    Bytes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(uint8_t* p, Bytes v) { std::memcpy(p, &v, sizeof v); }

// Some bits of the codes of one block, in a plane of their own: WIDTH of them, from bit SHIFT on.
template <int WIDTH, int SHIFT>
struct Plane {
    static constexpr int kBytes = 16 * WIDTH;
    static constexpr uint8_t kMask = (1 << WIDTH) - 1;

    static void pack(const uint8_t* codes, uint8_t* plane) {
        for (int start = 0; start < kBytes; start += 16) {
            Bytes packed = {};
            for (uint8_t bit = 0; bit < 8; bit += WIDTH)
                packed |= (load(codes + bit * 16 + start) >> SHIFT & kMask) << bit;
            store(plane + start, packed);
        }
    }

    static void unpack(const uint8_t* plane, uint8_t* codes) {
        for (int start = 0; start < kBytes; start += 16)
            for (uint8_t bit = 0; bit < 8; bit += WIDTH) {
                uint8_t* target = codes + bit * 16 + start;
                const Bytes fields = (load(plane + start) >> bit & kMask) << SHIFT;
                store(target, SHIFT ? load(target) | fields : fields);
            }
    }
};

// Calls f(number, Plane{}) for each of the planes of codes of `bits` bits.
template <class F>
inline void each_plane(int64_t bits, const F& f) {
    switch (bits) {
        case 2: return f(0, Plane<2, 0>{});
        case 3: return f(0, Plane<2, 0>{}), f(1, Plane<1, 2>{});
        case 4: return f(0, Plane<4, 0>{});
        case 5: return f(0, Plane<4, 0>{}), f(1, Plane<1, 4>{});
        case 6: return f(0, Plane<4, 0>{}), f(1, Plane<2, 4>{});
        case 8: return f(0, Plane<8, 0>{});
    }
}

#include "code_run.inc"

}  // namespace

const Path& path() {
    const Path* found = chosen.load(std::memory_order_relaxed);
    if (!found) chosen.store(found = find_path(nullptr), std::memory_order_relaxed);
    return *found;
}

}  // namespace hlwq

using namespace hlwq;

const char* hlwq_path() { return path().name; }

int32_t hlwq_set_path(const char* name) {
    const Path* found = find_path(name);
    if (found) chosen = found;
    return found != nullptr;
}

void hlwq_set_threads(int32_t threads) { set_threads(threads); }

int32_t hlwq_threads() { return threads(); }

void hlwq_pack(const uint8_t* codes, int64_t rows, int64_t columns, int64_t bits, uint8_t* const* planes) {
    pieces(rows * columns / kBlock, 1024, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; block++)
            each_plane(bits, [&](int number, auto plane) {
                plane.pack(codes + block * kBlock, planes[number] + block * plane.kBytes);
            });
    });
}

void hlwq_unpack(const uint8_t* const* planes, int64_t rows, int64_t columns, int64_t bits, uint8_t* codes) {
    pieces(rows * columns / kBlock, 1024, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; block++)
            each_plane(bits, [&](int number, auto plane) {
                plane.unpack(planes[number] + block * plane.kBytes, codes + block * kBlock);
            });
    });
}

void hlwq_unpack_run(const uint8_t* run, int64_t groups, int64_t bits, int32_t most_significant_first, uint8_t* codes) {
    pieces(groups, 16384, [&](int64_t first, int64_t last) {
        kUnpack[bits](run + first * bits, run + groups * bits, last - first, most_significant_first, codes + first * 8);
    });
}

void hlwq_repack_run(const uint8_t* run, int64_t blocks, int64_t width, int32_t most_significant_first, int64_t bits,
                     uint8_t* const* planes) {
    constexpr int64_t kEights = kBlock / 8;
    const uint8_t* end = run + blocks * kEights * width;
    pieces(blocks, 1024, [&](int64_t first, int64_t last) {
        uint8_t codes[kBlock];
        for (int64_t block = first; block < last; block++) {
            kUnpack[width](run + block * kEights * width, end, kEights, most_significant_first, codes);
            each_plane(bits, [&](int number, auto plane) {
                plane.pack(codes, planes[number] + block * plane.kBytes);
            });
        }
    });
}

void hlwq_hadamard(float* x, int64_t blocks) {
    const Path& kernels = path();
    pieces(blocks, 256, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; block++) kernels.hadamard(x + block * kBlock);
    });
}

int32_t hlwq_quantize(const void* weights, int32_t type, int64_t rows, int64_t columns, const HlwqGrid* grid,
                      const float* shares, int32_t count, uint8_t* codes, uint16_t* norms) {
    const Path& kernels = path();
    const int64_t width = padded(columns), size = type == HLWQ_FLOAT32 ? 4 : 2;
    std::atomic<bool> good{true};
    pieces(rows, 8, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++)
            if (!kernels.quantize(static_cast<const uint8_t*>(weights) + row * columns * size, type, columns, *grid,
                                  shares, count, codes + row * width, norms + row * width / kBlock))
                good = false;
    });
    return good;
}

void hlwq_decode(const HlwqLayout* layout, const uint8_t* record, int32_t type, void* weights) {
    const Path& kernels = path();
    const int64_t bytes = layout->in_features * (type == HLWQ_FLOAT32 ? 4 : 2);
    pieces(layout->out_features, 8, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++)
            kernels.decode(*layout, record, row, type, static_cast<uint8_t*>(weights) + row * bytes);
    });
}

static void product(const HlwqLayout* layout, const uint8_t* record, const float* x, int64_t rows, float* y) {
    const Path& kernels = path();
    Rows prepared(rows, kernels.stride(*layout));
    std::vector<const float*> sources(rows);
    std::vector<float*> targets(rows);
    for (int64_t row = 0; row < rows; row++) {
        sources[row] = prepared[row];
        targets[row] = y + row * layout->out_features;
    }
    pieces(rows, 4, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++)
            kernels.prepare(*layout, x + row * layout->in_features, false, prepared[row]);
    });
    const int64_t outputs = rows == 1 ? run_of(layout->out_features, kOutputs) : kOutputs;
    pieces(layout->out_features, outputs, [&](int64_t first, int64_t last) {
        kernels.product(*layout, record, sources.data(), rows, first, last, targets.data());
    });
}

int32_t hlwq_product(const HlwqLayout* layout, const uint8_t* record, const float* x, int64_t rows, float* y) {
    return unless_out_of_memory([&] { product(layout, record, x, rows, y); });
}

static void experts_of(const HlwqLayout* up, const HlwqLayout* down, const uint8_t* const* records, int64_t experts,
                       const int64_t* starts, const int64_t* pairs, int64_t k, const float* x, float* products) {
    const Path& kernels = path();
    const int64_t hidden = up->in_features, inner = up->out_features, count = starts[experts];
    std::vector<int64_t> rows(count);  // the distinct rows, ascending, each prepared once
    for (int64_t i = 0; i < count; i++) rows[i] = pairs[i] / k;
    std::sort(rows.begin(), rows.end());
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());

    Rows inputs(int64_t(rows.size()), kernels.stride(*up)), middle(count, inner), prepared(count, kernels.stride(*down));
    std::vector<const float*> up_sources(count), down_sources(count);
    std::vector<float*> up_targets(count), down_targets(count);
    for (int64_t i = 0; i < count; i++) {
        up_sources[i] = inputs[std::lower_bound(rows.begin(), rows.end(), pairs[i] / k) - rows.begin()];
        up_targets[i] = middle[i];
        down_sources[i] = prepared[i];
        down_targets[i] = products + pairs[i] * hidden;
    }
    auto multiply = [&](const HlwqLayout& layout, const float* const* sources, float* const* targets) {
        const int64_t outputs = count == experts ? run_of(experts * layout.out_features, kOutputs) : kOutputs;
        const int64_t each = (layout.out_features + outputs - 1) / outputs;
        parallel_for(experts * each, [&](int64_t piece) {
            const int64_t expert = piece / each, first = piece % each * outputs, start = starts[expert];
            kernels.product(layout, records[expert], sources + start, starts[expert + 1] - start, first,
                            std::min(layout.out_features, first + outputs), targets + start);
        });
    };
    pieces(int64_t(rows.size()), 4, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) kernels.prepare(*up, x + rows[i] * hidden, false, inputs[i]);
    });
    multiply(*up, up_sources.data(), up_targets.data());
    pieces(count, 4, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) kernels.prepare(*down, middle[i], true, prepared[i]);
    });
    multiply(*down, down_sources.data(), down_targets.data());
}

int32_t hlwq_experts(const HlwqLayout* up, const HlwqLayout* down, const uint8_t* const* records, int64_t experts,
                     const int64_t* starts, const int64_t* pairs, int64_t k, const float* x, float* products) {
    return unless_out_of_memory([&] { experts_of(up, down, records, experts, starts, pairs, k, x, products); });
}

void hlwq_combine(const float* products, const float* weights, int64_t rows, int64_t k, int64_t hidden, float* sums) {
    pieces(rows, 16, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            float* sum = sums + row * hidden;
            std::fill(sum, sum + hidden, 0.0f);
            for (int64_t rank = 0; rank < k; rank++) {
                const float* product = products + (row * k + rank) * hidden;
                const float weight = weights[row * k + rank];
                for (int64_t i = 0; i < hidden; i++) sum[i] += weight * product[i];
            }
        }
    });
}
