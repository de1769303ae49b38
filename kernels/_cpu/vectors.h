// What all parts of the product share.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <utility>

namespace {

using V = __m512i;
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

ALWAYS __m512 widened(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

// Scales and shifts of 16 outputs, bfloat16 or float32.
ALWAYS __m512 ranges(const void* at, int64_t index, bool narrow) {
    if (narrow) return widened(_mm256_loadu_si256((const __m256i*)((const uint16_t*)at + index)));
    return _mm512_loadu_ps((const float*)at + index);
}

struct Product {
    const uint8_t* w;      // blocks of 16 outputs, [N / 16, K / inputs of a block]
    const void* table;     // values of the codes, for bfloat16 tokens; or [G, N] of 16 values
    const void *s, *d;     // [G, N]: scales and shifts, or null
    const float* rows;     // [N]: what tokens with zero points take off, or null
    const float *sx, *zx;  // [M], or null
    void* y;               // [M, N]
    int64_t M, N, K, group;
    int narrow_s, narrow_d, narrow_y, middle, threads;
};

}  // namespace
