#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>

namespace hlwq {
namespace {

constexpr int kFieldBits = 24;
constexpr uint64_t kField = (uint64_t(1) << kFieldBits) - 1;

// One loop at a time is open to all. Its pieces are claimed from `ticket`, which holds the loop's number, its
// count of pieces and the next piece in one word, so that a thread that comes late, when another loop is open,
// can only claim a whole piece of that one, or none. A loop ends when its pieces are done: nobody waits for a
// thread that has none.
struct Pool {
    std::mutex turn;   // held while a loop is open, or while threads come and go
    std::mutex mutex;  // of those who sleep
    std::condition_variable opened, finished;
    std::vector<std::thread> workers;
    std::atomic<int> threads{1};  // those that take part, the caller included
    std::atomic<int> spin{kDefaultSpin};
    std::atomic<bool> stopping{false};
    std::atomic<uint64_t> ticket{0};  // loop number | count | next
    std::atomic<int64_t> done{0};
    const std::function<void(int64_t)>* body = nullptr;  // valid as long as a piece is claimed and not done
    const pid_t owner = getpid();

    static int64_t next(uint64_t ticket) { return ticket & kField; }
    static int64_t count(uint64_t ticket) { return ticket >> kFieldBits & kField; }
    static uint64_t number(uint64_t ticket) { return ticket >> 2 * kFieldBits; }
    static bool open(uint64_t ticket) { return next(ticket) < count(ticket); }

    std::chrono::microseconds spin_time() const {
        return std::chrono::microseconds(spin.load(std::memory_order_relaxed));
    }

    // Claims pieces until none is left.
    void take() {
        for (uint64_t claim; open(claim = ticket.fetch_add(1, std::memory_order_acq_rel));) {
            (*body)(next(claim));
            if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == count(claim)) {
                std::lock_guard lock(mutex);
                finished.notify_one();
            }
        }
    }

    void serve() {
        while (!stopping) {
            const auto until = std::chrono::steady_clock::now() + spin_time();
            while (!open(ticket.load(std::memory_order_acquire)) && !stopping) {
                if (relax(); std::chrono::steady_clock::now() < until) continue;
                std::unique_lock lock(mutex);
                opened.wait(lock, [&] { return open(ticket.load()) || stopping; });
            }
            if (!stopping) take();
        }
    }

    void run(int64_t pieces, const std::function<void(int64_t)>& piece) {
        body = &piece;
        done.store(0, std::memory_order_relaxed);
        const uint64_t loop = number(ticket.load()) + 1;
        {
            std::lock_guard lock(mutex);
            ticket.store(loop << 2 * kFieldBits | uint64_t(pieces) << kFieldBits, std::memory_order_release);
        }
        opened.notify_all();
        take();
        const auto until = std::chrono::steady_clock::now() + spin_time();
        while (done.load(std::memory_order_acquire) != pieces) {
            if (relax(); std::chrono::steady_clock::now() < until) continue;
            std::unique_lock lock(mutex);
            finished.wait(lock, [&] { return done.load() == pieces; });
        }
    }

    void resize(int wanted) {
        {
            std::lock_guard lock(mutex);
            stopping = true;
        }
        opened.notify_all();
        for (auto& worker : workers) worker.join();
        workers.clear();
        stopping = false;
        try {
            for (int i = 1; i < wanted; i++) workers.emplace_back(&Pool::serve, this);
        } catch (const std::exception&) {  // there can be no more: those that came will do
        }
        threads = 1 + int(workers.size());
    }
};

// Never destroyed: its threads may still spin while the process exits. A fork leaves them behind, so the child
// gets a pool of its own, which begins without threads.
Pool& pool() {
    static std::atomic<Pool*> instance{nullptr};  // no lock: a fork may leave one held by a thread that is gone
    Pool* found = instance.load();
    if (found && found->owner == getpid()) return *found;
    Pool* const made = new Pool;
    if (instance.compare_exchange_strong(found, made)) return *made;
    delete made;  // another thread was first
    return *found;
}

}  // namespace

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
    Pool& shared = pool();
    // Every thread claims one piece that does not exist before it stops: these must fit the field as well.
    if (count <= 1 || shared.threads == 1 || uint64_t(count) > kField / 2) {
        for (int64_t i = 0; i < count; i++) body(i);
        return;
    }
    std::lock_guard turn(shared.turn);
    shared.run(count, body);
}

int threads() { return pool().threads; }

void set_threads(int threads) {
    Pool& shared = pool();
    if (shared.threads == threads) return;
    std::lock_guard turn(shared.turn);
    shared.resize(threads);
}

void set_spin(int microseconds) { pool().spin = microseconds; }

}  // namespace hlwq
