// Compiles a function for several instruction sets and chooses among them when the library is loaded.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES [[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#else
#define CLONES
#endif

constexpr int kLanes = 16;  // partial sums side by side: what lets the compiler use vectors without reordering
