// What stands between two products of a token, on the CPU: the norm before a block, and the router. Each is small,
// but weights stream through the caches between two of them, so that every operation of PyTorch starts cold. The
// twins are gpu_worker/model/norms.py and moe.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "../../common/hlwq/native/pool.h"
#include "clones.h"

extern "C" {

// y = x / sqrt(mean(x^2) + epsilon) * weight, row by row.
void rms_norm(const float* x, const float* weight, float epsilon, int64_t rows, int64_t columns, float* y);

// x (rows, hidden) under gate (experts, hidden): the k best of sigmoid(x gate^T) + bias, best first, and their
// weights without the bias, which add up to `scaling` if `normalise`, else are scaled by it. Returns 0 if memory runs
// out.
int32_t route(const float* x, const float* gate, const float* bias, int64_t rows, int64_t experts, int64_t hidden,
              int64_t k, int32_t normalise, float scaling, int64_t* choices, float* weights);
}

namespace {

CLONES float dot(const float* a, const float* b, int64_t count) {
    float sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int lane = 0; lane < kLanes; lane++) sums[lane] += a[i + lane] * b[i + lane];
    float sum = 0;
    for (; i < count; i++) sum += a[i] * b[i];
    for (float part : sums) sum += part;
    return sum;
}

CLONES void scale(const float* x, const float* weight, float factor, int64_t count, float* y) {
    for (int64_t i = 0; i < count; i++) y[i] = x[i] * factor * weight[i];
}

// The k best of scores + bias; the lower expert first where two are equal. `chosen` has a place for each expert.
void choose(const float* scores, const float* bias, int64_t experts, int64_t k, bool* chosen, int64_t* choices) {
    std::fill(chosen, chosen + experts, false);
    for (int64_t rank = 0; rank < k; rank++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++)
            if (!chosen[e] && (best < 0 || scores[e] + bias[e] > scores[best] + bias[best])) best = e;
        chosen[best] = true;
        choices[rank] = best;
    }
}

}  // namespace

void rms_norm(const float* x, const float* weight, float epsilon, int64_t rows, int64_t columns, float* y) {
    for (int64_t row = 0; row < rows; row++, x += columns, y += columns)
        scale(x, weight, 1.0f / std::sqrt(dot(x, x, columns) / float(columns) + epsilon), columns, y);
}

int32_t route(const float* x, const float* gate, const float* bias, int64_t rows, int64_t experts, int64_t hidden,
              int64_t k, int32_t normalise, float scaling, int64_t* choices, float* weights) {
    const std::unique_ptr<float[]> scores(new (std::nothrow) float[rows * experts]);
    const std::unique_ptr<bool[]> chosen(new (std::nothrow) bool[experts]);
    if (!scores || !chosen) return 0;
    constexpr int64_t kExperts = 8;
    const int64_t parts = (experts + kExperts - 1) / kExperts;
    hlwq::parallel_for(rows * parts, [&](int64_t piece) {
        const int64_t row = piece / parts, first = piece % parts * kExperts;
        for (int64_t e = first; e < std::min(experts, first + kExperts); e++)
            scores[row * experts + e] = 1.0f / (1.0f + std::exp(-dot(x + row * hidden, gate + e * hidden, hidden)));
    });
    for (int64_t row = 0; row < rows; row++) {
        const float* own = scores.get() + row * experts;
        choose(own, bias, experts, k, chosen.get(), choices + row * k);
        float total = 0;
        for (int64_t rank = 0; rank < k; rank++) total += own[choices[row * k + rank]];
        const float factor = normalise ? scaling / (total + 1e-20f) : scaling;
        for (int64_t rank = 0; rank < k; rank++) weights[row * k + rank] = own[choices[row * k + rank]] * factor;
    }
    return 1;
}
