// A pool of threads that share a counted loop. Owns the threads; knows nothing of what they compute.
//
// Pieces are handed out by one atomic counter, so that a core that is busy elsewhere takes fewer of them, or none.
// Threads spin for a short while before they sleep: the loops of one token follow each other within microseconds,
// and waking a sleeping thread takes longer than many of them. How long, may be set.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <new>

namespace hlwq {

// Calls body(i) for every i in [0, count), on the calling thread and the pool's; returns when all are done. Calls
// from several threads at once take turns. `body` must not call parallel_for.
void parallel_for(int64_t count, const std::function<void(int64_t)>& body);

// The threads that take part, the caller included; from 1 up. Fewer, where the system gives no more.
void set_threads(int threads);
int threads();

// How many of `items`, which are read once and lie one after the other, a piece should have, at least `fewest`. In
// long runs what is fetched early is seldom another thread's; with several for each, one that is held up leaves the
// rest to others.
inline int64_t run_of(int64_t items, int64_t fewest) {
    constexpr int64_t kTurns = 6;
    const int64_t pieces = kTurns * threads();
    const int64_t items_each = (items + pieces - 1) / pieces;
    return std::max(fewest, (items_each + 7) / 8 * 8);  // some kernels compute a few at once
}

// How long a thread spins before it sleeps, from its next wait on.
constexpr int kDefaultSpin = 30;  // microseconds
void set_spin(int microseconds);

// Calls body(); 0 if memory ran out meanwhile: an exception must not reach a caller that is not C++.
template <class Body>
inline int32_t unless_out_of_memory(const Body& body) {
    try {
        return body(), 1;
    } catch (const std::bad_alloc&) {
        return 0;
    }
}

// Between two looks at what a thread waits for: leaves the core's other thread its share.
inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace hlwq
