// Mamba-2's mixer between its two projections, on the CPU: convolution, time step, recurrence, gated norm, token by
// token. States are advanced in place. A head's state fits the first-level cache, so that a prompt costs one pass
// over it a token, less than the chunked form costs in PyTorch, and gives the same bits however it is cut. The twin
// is in gpu_worker/model/mamba2.py and ssd.py.
#include <cmath>
#include <cstdint>
#include <new>

#include "../../common/hlwq/native/pool.h"
#include "clones.h"

extern "C" {

struct Mamba2Shape {
    int64_t heads, head_dim, groups, state, conv_kernel;
    float time_step_min, epsilon;
    const float *conv_weight, *conv_bias, *dt_bias, *A, *D, *norm;  // conv_bias may be null
};

// projected (sequences, tokens, inner + channels + heads): gate, convolution inputs, dt; y (sequences, tokens, inner).
// conv_states (places, channels, conv_kernel - 1), ssm_states (places, heads, head_dim, state): those at `places`
// (sequences) advance. Returns 0, with all states as they were, if memory runs out.
int32_t mamba2_scan(const Mamba2Shape* shape, int64_t sequences, int64_t tokens, const int64_t* places,
                    const float* projected, float* conv_states, float* ssm_states, float* y);
}

namespace {

// e^x to about two units in the last place (Cephes' expf), without branches, so that loops over it vectorise.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float power = std::nearbyint(x * 1.44269504088896341f);
    const float r = (x - power * 0.693359375f) + power * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t bits = uint32_t(int32_t(power) + 127) << 23;
    float scale;
    __builtin_memcpy(&scale, &bits, 4);
    return p * scale;
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// Channels [first, last) of all tokens: y = silu(bias + state and x under the kernel); the state moves on.
CLONES void convolve(const Mamba2Shape& s, int64_t tokens, int64_t first, int64_t last, const float* x,
                     int64_t x_stride, float* states, float* y, int64_t y_stride) {
    const int64_t taps = s.conv_kernel - 1;
    for (int64_t token = 0; token < tokens; token++, x += x_stride, y += y_stride) {
        for (int64_t c = first; c < last; c++) {
            float* state = states + c * taps;
            const float* weight = s.conv_weight + c * s.conv_kernel;
            float sum = s.conv_bias ? s.conv_bias[c] : 0.0f;
            for (int64_t i = 0; i < taps; i++) sum += state[i] * weight[i];
            sum += x[c] * weight[taps];
            for (int64_t i = 0; i + 1 < taps; i++) state[i] = state[i + 1];
            if (taps) state[taps - 1] = x[c];
            y[c] = sum;
        }
        for (int64_t c = first; c < last; c++) y[c] = silu(y[c]);
    }
}

// One head, one token: state = state * exp(dt A) + (dt x) B, y = state C + D x.
CLONES void advance(const Mamba2Shape& s, int64_t head, float dt, const float* x, const float* B, const float* C,
                    float* state, float* y) {
    const float decay = std::exp(dt * s.A[head]), skip = s.D[head];
    for (int64_t p = 0; p < s.head_dim; p++) {
        const float added = x[p] * dt;
        float* row = state + p * s.state;
        float sums[kLanes] = {};
        int64_t n = 0;
        for (; n + kLanes <= s.state; n += kLanes)
            for (int lane = 0; lane < kLanes; lane++) {
                const float value = row[n + lane] * decay + added * B[n + lane];
                row[n + lane] = value;
                sums[lane] += value * C[n + lane];
            }
        float sum = 0;
        for (; n < s.state; n++) {
            row[n] = row[n] * decay + added * B[n];
            sum += row[n] * C[n];
        }
        for (float part : sums) sum += part;
        y[p] = sum + x[p] * skip;
    }
}

// One group of channels: x silu(gate) over its root mean square, times the norm's weight.
CLONES void gated_norm(const Mamba2Shape& s, int64_t first, int64_t last, const float* gate, float* y) {
    float squares[kLanes] = {};
    for (int64_t c = first; c < last; c++) y[c] *= silu(gate[c]);
    int64_t c = first;
    for (; c + kLanes <= last; c += kLanes)
        for (int lane = 0; lane < kLanes; lane++) squares[lane] += y[c + lane] * y[c + lane];
    float square = 0;
    for (; c < last; c++) square += y[c] * y[c];
    for (float part : squares) square += part;
    const float scale = 1.0f / std::sqrt(square / float(last - first) + s.epsilon);
    for (c = first; c < last; c++) y[c] *= scale * s.norm[c];
}

}  // namespace

int32_t mamba2_scan(const Mamba2Shape* shape, int64_t sequences, int64_t tokens, const int64_t* places,
                    const float* projected, float* conv_states, float* ssm_states, float* y) {
    const Mamba2Shape& s = *shape;
    const int64_t inner = s.heads * s.head_dim, channels = inner + 2 * s.groups * s.state;
    const int64_t width = inner + channels + s.heads, each = s.heads / s.groups, span = inner / s.groups;
    float* const convolved = new (std::nothrow) float[sequences * tokens * channels];
    if (!convolved) return 0;
    constexpr int64_t kChannels = 256;
    const int64_t parts = (channels + kChannels - 1) / kChannels;
    hlwq::parallel_for(sequences * parts, [&](int64_t piece) {
        const int64_t sequence = piece / parts, first = piece % parts * kChannels;
        const int64_t last = first + kChannels < channels ? first + kChannels : channels, row = sequence * tokens;
        convolve(s, tokens, first, last, projected + row * width + inner, width,
                 conv_states + places[sequence] * channels * (s.conv_kernel - 1), convolved + row * channels, channels);
    });
    hlwq::parallel_for(sequences * s.groups, [&](int64_t piece) {
        const int64_t sequence = piece / s.groups, group = piece % s.groups, start = sequence * tokens;
        for (int64_t head = group * each; head < (group + 1) * each; head++) {
            float* state = ssm_states + (places[sequence] * s.heads + head) * s.head_dim * s.state;
            for (int64_t row = start; row < start + tokens; row++) {
                const float *x = convolved + row * channels, *B = x + inner + group * s.state;
                const float raw = projected[row * width + inner + channels + head] + s.dt_bias[head];
                const float step = raw > 20.0f ? raw : std::log1p(std::exp(raw));  // softplus
                advance(s, head, step < s.time_step_min ? s.time_step_min : step, x + head * s.head_dim, B,
                        B + s.groups * s.state, state, y + row * inner + head * s.head_dim);
            }
        }
        for (int64_t row = start; row < start + tokens; row++)
            gated_norm(s, group * span, (group + 1) * span, projected + row * width, y + row * inner);
    });
    delete[] convolved;
    return 1;
}
