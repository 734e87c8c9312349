#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>

namespace hlwq {
namespace {

constexpr auto kSpin = std::chrono::microseconds(30);

struct Pool {
    std::mutex turn;  // one loop at a time
    std::mutex mutex;  // guards `round`, `stopping` for those who sleep
    std::condition_variable wake, done;
    std::vector<std::thread> workers;
    std::atomic<uint64_t> round{0};
    std::atomic<int64_t> next{0};
    std::atomic<int> running{0};
    std::atomic<bool> stopping{false};
    std::atomic<int> threads{1};  // those that take part, the caller included
    const std::function<void(int64_t)>* body = nullptr;
    int64_t count = 0;
    pid_t owner = getpid();

    void take() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) (*body)(i);
    }

    void serve(uint64_t seen) {
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + kSpin;
            while (round.load(std::memory_order_acquire) == seen && !stopping) {
                if (std::chrono::steady_clock::now() < until) continue;
                std::unique_lock lock(mutex);
                wake.wait(lock, [&] { return round.load() != seen || stopping; });
            }
            if (stopping) return;
            seen = round.load(std::memory_order_acquire);
            take();
            if (running.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                std::lock_guard lock(mutex);
                done.notify_one();
            }
        }
    }

    void run(int64_t pieces, const std::function<void(int64_t)>& piece) {
        body = &piece;
        count = pieces;
        next.store(0, std::memory_order_relaxed);
        running.store(int(workers.size()), std::memory_order_relaxed);
        {
            std::lock_guard lock(mutex);
            round.fetch_add(1, std::memory_order_release);
        }
        wake.notify_all();
        take();
        const auto until = std::chrono::steady_clock::now() + kSpin;
        while (running.load(std::memory_order_acquire) != 0) {
            if (std::chrono::steady_clock::now() < until) continue;
            std::unique_lock lock(mutex);
            done.wait(lock, [&] { return running.load() == 0; });
        }
    }

    void resize(int wanted) {
        {
            std::lock_guard lock(mutex);
            stopping = true;
        }
        wake.notify_all();
        for (auto& worker : workers) worker.join();
        workers.clear();
        stopping = false;
        threads = wanted;
        for (int i = 1; i < wanted; i++) workers.emplace_back(&Pool::serve, this, round.load());
    }
};

// Never destroyed: its threads may still spin while the process exits. A fork leaves them behind, so the child
// gets a pool of its own, which begins without threads.
Pool& pool() {
    static std::mutex guard;
    static Pool* instance = nullptr;
    std::lock_guard lock(guard);
    if (!instance || instance->owner != getpid()) instance = new Pool;
    return *instance;
}

}  // namespace

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
    Pool& shared = pool();
    if (count <= 1 || shared.threads == 1) {
        for (int64_t i = 0; i < count; i++) body(i);
        return;
    }
    std::lock_guard turn(shared.turn);
    shared.run(count, body);
}

void set_threads(int threads) {
    Pool& shared = pool();
    if (shared.threads == threads) return;
    std::lock_guard turn(shared.turn);
    shared.resize(threads);
}

}  // namespace hlwq
