// Experts for one row in the order of a GPU worker's kernels: how their rows are divided among threads. The
// arithmetic is in device_order.inc.
#include <algorithm>
#include <atomic>
#include <memory>

#include "kernels.h"
#include "path.h"
#include "pool.h"

namespace hlwq {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kFewest = 16;  // outputs of a piece

int64_t padded(int64_t columns) { return (columns + kBlock - 1) / kBlock * kBlock; }

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the rows of one matrix of each of `experts` are divided.
struct Pieces {
    const int64_t rows, outputs, each;  // of a matrix; in a piece; pieces of a matrix

    Pieces(const HlwqLayout& layout, int64_t experts)
        : rows(layout.out_features),
          outputs(run_of(rows * experts, kFewest)),
          each(ceiling(rows, outputs)) {}
    int64_t expert(int64_t piece) const { return piece / each; }
    int64_t first(int64_t piece) const { return piece % each * outputs; }
    int64_t last(int64_t piece) const { return std::min(first(piece) + outputs, rows); }
};

// What lies between the projections. It grows, and stays with the thread that calls.
class Scratch {
   public:
    void reserve(int64_t experts, int64_t inner) {
        width_ = padded(inner);
        if (experts > experts_) left_.reset(new std::atomic<int64_t>[experts_ = experts]);
        if (2 * experts * width_ > floats_) {
            floats_ = 2 * experts * width_;
            memory_.reset(new float[floats_ + 16]);
        }
        const auto start = reinterpret_cast<uintptr_t>(memory_.get());
        start_ = memory_.get() + (64 - start % 64) % 64 / 4;
    }
    float* inner(int64_t expert) { return start_ + 2 * expert * width_; }
    float* prepared(int64_t expert) { return inner(expert) + width_; }
    std::atomic<int64_t>& left(int64_t expert) { return left_[expert]; }

   private:
    int64_t experts_ = 0, floats_ = 0, width_ = 0;
    std::unique_ptr<std::atomic<int64_t>[]> left_;
    std::unique_ptr<float[]> memory_;
    float* start_ = nullptr;
};

struct Experts {
    const Path& kernels;
    const HlwqLayout &up, &down;
    const uint8_t* const* records;
    const float* x;
    float* const* products;
    Scratch& scratch;
    const Pieces ups, downs;

    // Whoever computes the last of an expert's rows makes activations of them: a loop of its own would cost more.
    void up_piece(int64_t piece) const {
        const int64_t expert = ups.expert(piece);
        float* inner = scratch.inner(expert);
        kernels.device_product(up, records[expert], x, ups.first(piece), ups.last(piece), inner);
        if (scratch.left(expert).fetch_sub(1, std::memory_order_acq_rel) == 1)
            kernels.device_activations(inner, down.in_features, scratch.prepared(expert));
    }

    void down_piece(int64_t piece) const {
        const int64_t expert = downs.expert(piece);
        kernels.device_product(down, records[expert], scratch.prepared(expert), downs.first(piece), downs.last(piece),
                               products[expert]);
    }
};

}  // namespace
}  // namespace hlwq

using namespace hlwq;

int32_t hlwq_device_experts(const HlwqLayout* up, const HlwqLayout* down, const uint8_t* const* records,
                            int64_t count, const float* x, float* const* products) {
    static thread_local Scratch scratch;
    if (!unless_out_of_memory([&] { scratch.reserve(count, up->out_features); })) return 0;
    const Experts experts{path(), *up, *down, records, x, products, scratch, {*up, count}, {*down, count}};
    for (int64_t expert = 0; expert < count; expert++) scratch.left(expert) = experts.ups.each;
    parallel_for(count * experts.ups.each, [&experts](int64_t piece) { experts.up_piece(piece); });
    parallel_for(count * experts.downs.each, [&experts](int64_t piece) { experts.down_piece(piece); });
    return 1;
}
