// The expert lane: one thread that computes routed experts for a GPU, which asks for them through a mailbox in
// page-locked memory. Owns that thread, and how long the pool's threads spin; knows nothing of why an expert is asked
// for, nor of CUDA. The arithmetic is common/hlwq/native/device_order.inc.
//
// A request's words and x are written before its sequence, products before the answer: both sequences are read with
// acquire and written with release, the GPU's side by fences of the system's scope.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "../../common/hlwq/native/kernels.h"
#include "../../common/hlwq/native/pool.h"

extern "C" {

// What a lane works on. Everything but the layouts must outlive it; the mailbox is the last four.
struct HlwqLane {
    const HlwqLayout *up, *down;  // of each layer
    int64_t layers;
    const uint8_t* frames;  // records, `stride` bytes apart
    int64_t frame_count, stride;
    int64_t pairs;                  // that a request can have, at most kMostPairs
    int64_t hidden;                 // floats of a product
    const volatile int32_t* request;  // [0] sequence, written last; [1] layer; [2 + p] frame of pair p, or -1
    const float* x;                 // one row as hlwq_device_experts takes it
    int32_t* answered;              // sequence of the last request that was answered
    float* products;                // (pairs, hidden): those of pairs with a frame are written
};

// Starts a lane, which answers what differs from `answered`. Null if the system gives no thread for it.
void* hlwq_lane_start(const HlwqLane* lane);
// Requests may come soon: makes a lane spin that sleeps. Costs no system call while it is awake.
void hlwq_lane_wake(void* handle);
void hlwq_lane_stop(void* handle);
}

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kMostPairs = 16;
constexpr auto kAwake = std::chrono::milliseconds(100);  // without a request or a wake; also how long the pool spins
constexpr auto kLook = std::chrono::milliseconds(50);   // asleep: nobody waits for ever if a wake is missed

[[noreturn]] void broken(const char* what, int64_t value) {
    std::fprintf(stderr, "expert lane: the request has %s %lld, which cannot be\n", what, (long long)value);
    std::abort();
}

class Lane {
   public:
    explicit Lane(const HlwqLane& lane)
        : lane_(lane),
          up_(lane.up, lane.up + lane.layers),
          down_(lane.down, lane.down + lane.layers),
          seen_(*lane.answered),
          thread_(&Lane::lead, this) {}

    ~Lane() {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        called_.notify_one();
        thread_.join();
        hlwq::set_spin(hlwq::kDefaultSpin);
    }

    // Either the leader, about to sleep, sees the count, or this sees that it sleeps: both are sequentially consistent.
    void wake() {
        wakes_.fetch_add(1);
        if (!asleep_.load()) return;
        std::lock_guard lock(mutex_);
        called_.notify_one();
    }

   private:
    void lead() {
        while (!stopping_) {
            hlwq::set_spin(int(std::chrono::microseconds(kAwake).count()));
            watch();
            hlwq::set_spin(hlwq::kDefaultSpin);
            sleep();
        }
    }

    // Answers requests until none has come for a while.
    void watch() {
        auto until = Clock::now() + kAwake;
        while (!stopping_ && Clock::now() < until) {
            const bool asked = requested(), woken = wakes_.load(std::memory_order_relaxed) != wakes_seen_;
            if (asked) answer();
            if (woken) wakes_seen_ = wakes_.load(std::memory_order_relaxed);
            if (asked || woken)
                until = Clock::now() + kAwake;
            else
                hlwq::relax();
        }
    }

    void sleep() {
        std::unique_lock lock(mutex_);
        asleep_ = true;
        while (!called_.wait_for(lock, kLook, [&] { return stopping_ || wakes_ != wakes_seen_ || requested(); })) {
        }
        asleep_ = false;
    }

    int32_t sequence() const { return __atomic_load_n(lane_.request, __ATOMIC_ACQUIRE); }
    bool requested() const { return sequence() != seen_; }

    void answer() {
        const int32_t asked = sequence();
        const int64_t layer = lane_.request[1];
        if (layer < 0 || layer >= lane_.layers) broken("layer", layer);
        const uint8_t* records[kMostPairs];
        float* products[kMostPairs];
        int64_t count = 0;
        for (int64_t pair = 0; pair < lane_.pairs; pair++) {
            const int64_t frame = lane_.request[2 + pair];
            if (frame == -1) continue;
            if (frame < 0 || frame >= lane_.frame_count) broken("frame", frame);
            records[count] = lane_.frames + frame * lane_.stride;
            products[count++] = lane_.products + pair * lane_.hidden;
        }
        if (!hlwq_device_experts(&up_[layer], &down_[layer], records, count, lane_.x, products)) {
            std::fprintf(stderr, "expert lane: no memory to compute with\n");  // the GPU waits: nobody can be told
            std::abort();
        }
        __atomic_store_n(lane_.answered, seen_ = asked, __ATOMIC_RELEASE);
    }

    const HlwqLane lane_;
    const std::vector<HlwqLayout> up_, down_;
    int32_t seen_;  // the leader's, as is the next one
    int64_t wakes_seen_ = 0;
    std::atomic<int64_t> wakes_{0};
    std::atomic<bool> asleep_{false}, stopping_{false};
    std::mutex mutex_;  // of the sleep
    std::condition_variable called_;
    std::thread thread_;  // last: it uses all others
};

}  // namespace

void* hlwq_lane_start(const HlwqLane* lane) {
    try {
        return new Lane(*lane);
    } catch (const std::exception&) {
        return nullptr;
    }
}

void hlwq_lane_wake(void* handle) { static_cast<Lane*>(handle)->wake(); }

void hlwq_lane_stop(void* handle) { delete static_cast<Lane*>(handle); }
