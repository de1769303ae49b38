// What all parts of the product share.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <utility>

namespace {

#define ALWAYS inline __attribute__((always_inline))
#define HERE __attribute__((always_inline))

constexpr int LANES = 16;      // outputs of a block
constexpr int64_t MOST = 512;  // tokens at a time: their sums stay in the second-level cache

// f(0), f(1) ... with constants: an array that is only read at constants stays in registers, also before loops unroll.
template <class F, int... I>
ALWAYS void each(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class F>
ALWAYS void each(F f) {
    each(f, std::make_integer_sequence<int, COUNT>{});
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;
template <class T>
Buffer<T> buffer(size_t count) {
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
}

// By all threads at once; one thread stays out of OpenMP, whose code may not be in the cache.
template <class F>
void together(int64_t threads, F f) {
    if (threads == 1) return f();
#pragma omp parallel num_threads(threads)
    f();
}

struct Product {
    const void* x;         // tokens [M, inputs]: bfloat16, int8, or what becomes int8
    const uint8_t* w;      // blocks
    const void* table;     // values of the codes, for bfloat16 tokens; or [N / 16, G, 16] of 16 values
    const void *s, *d;     // [N / 16, G, 16]: scales and shifts, or null
    const float* rows;     // [N]: what tokens with zero points take off, or null
    const float* tensor;   // [1]: scale of all weights, or null
    const float *sx, *zx;  // [M], or null
    void* y;               // [M, N]
    int64_t M, N, inputs, K;                         // K: inputs up to whole blocks
    int64_t group, groups;                           // columns of a scale or a table; G
    int64_t kind, middle;                            // one of layout.KINDS; the code that stands for 0
    int64_t narrow_x, narrow_s, narrow_d, narrow_y;  // bfloat16, else float32
    int64_t low, high, asymmetric;                   // the grid of tokens that become integers, or low = high
    int64_t threads;

    int64_t bytes() const { return kind < 6 ? narrow_x ? 2 : 4 : 1; }  // of a token's input
    int64_t units() const { return (N + LANES - 1) / LANES; }
    int64_t at(int64_t g, int64_t n) const { return (n / LANES * groups + g) * LANES + n % LANES; }
};

}  // namespace

#ifdef __AVX512BF16__
#include "avx512.h"
#else
#include "avx2.h"
#endif

namespace {

// Scales and shifts of 16 outputs, bfloat16 or float32.
ALWAYS F ranges(const void* at, int64_t index, bool narrow) {
    if (narrow) return widened((const uint16_t*)at + index);
    return anywhere((const float*)at + index);
}

}  // namespace
