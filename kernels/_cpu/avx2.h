// Sixteen lanes, as AVX2 has them: two times eight.
#pragma once
#include <cstring>

namespace {

struct F {  // floats
    __m256 low, high;
};
struct V {  // words, or what is in them
    __m256i low, high;
};
using Mask = int;             // the first so many lanes
constexpr int SUMS = 2;       // of one token side by side: decoding takes longer than an addition
constexpr bool WIDE = false;  // 8 of these in registers

ALWAYS Mask upto(int64_t count) { return (int)std::min<int64_t>(LANES, count); }
ALWAYS F all(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
ALWAYS V all(int v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
ALWAYS F load(const float* at) { return {_mm256_load_ps(at), _mm256_load_ps(at + 8)}; }
ALWAYS F anywhere(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
ALWAYS __m256 widened(__m128i bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}
ALWAYS F widened(const uint16_t* at) {
    const __m128i* half = (const __m128i*)at;
    return {widened(_mm_loadu_si128(half)), widened(_mm_loadu_si128(half + 1))};
}
ALWAYS void store(float* at, F v) { _mm256_storeu_ps(at, v.low), _mm256_storeu_ps(at + 8, v.high); }
ALWAYS __m256i narrowed(__m256 v) {  // bfloat16 in words of 32 bits: the nearest, the even one of two
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
}
ALWAYS void store(uint16_t* at, F v) {
    const __m256i words = _mm256_packus_epi32(narrowed(v.low), narrowed(v.high));
    _mm256_storeu_si256((__m256i*)at, _mm256_permute4x64_epi64(words, 0xd8));
}
ALWAYS void store(int8_t* at, V v) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.low, v.high), 0xd8);
    _mm_storeu_si128((__m128i*)at, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
ALWAYS F ends(const float* at) { return anywhere(at); }
ALWAYS F ends(const uint16_t* at) { return widened(at); }
template <class T>  // ends of rows go by way of the stack
ALWAYS F load(const T* at, Mask some) {
    if (some == LANES) return ends(at);
    T whole[LANES] = {};
    std::memcpy(whole, at, some * sizeof(T));
    return ends(whole);
}
template <class T, class O>
ALWAYS void store(T* at, Mask some, O v) {
    if (some == LANES) return store(at, v);
    T whole[LANES];
    store(whole, v);
    std::memcpy(at, whole, some * sizeof(T));
}
ALWAYS F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
ALWAYS V add(V a, V b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
ALWAYS V sub(V a, V b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
ALWAYS F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
ALWAYS F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
ALWAYS F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
ALWAYS F less(F c, F a, F b) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
ALWAYS F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
ALWAYS F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
template <class O>
ALWAYS float reduced(F v, O o) {
    alignas(32) float lane[LANES];
    store(lane, v);
    for (int i = LANES / 2; i; i /= 2)
        for (int j = 0; j < i; ++j) lane[j] = o(lane[j], lane[j + i]);
    return lane[0];
}
ALWAYS float least(F v) {
    return reduced(v, [](float a, float b) { return std::min(a, b); });
}
ALWAYS float most(F v) {
    return reduced(v, [](float a, float b) { return std::max(a, b); });
}
ALWAYS float sum(F v) {
    return reduced(v, [](float a, float b) { return a + b; });
}
ALWAYS int unordered(F v) {
    return _mm256_movemask_ps(
        _mm256_or_ps(_mm256_cmp_ps(v.low, v.low, _CMP_UNORD_Q), _mm256_cmp_ps(v.high, v.high, _CMP_UNORD_Q)));
}
ALWAYS V nearest(F v) { return {_mm256_cvtps_epi32(v.low), _mm256_cvtps_epi32(v.high)}; }
ALWAYS F number(V v) { return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)}; }
ALWAYS V words(const uint8_t* at) {
    return {_mm256_loadu_si256((const __m256i*)at), _mm256_loadu_si256((const __m256i*)at + 1)};
}
ALWAYS V halves(const uint8_t* at) {
    const __m128i* half = (const __m128i*)at;
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(half)), _mm256_cvtepu16_epi32(_mm_loadu_si128(half + 1))};
}
template <int BITS>
ALWAYS V right(V v) {
    return {_mm256_srli_epi32(v.low, BITS), _mm256_srli_epi32(v.high, BITS)};
}
template <int I>
ALWAYS V signed_byte(V v) {
    return {_mm256_srai_epi32(_mm256_slli_epi32(v.low, 24 - 8 * I), 24),
            _mm256_srai_epi32(_mm256_slli_epi32(v.high, 24 - 8 * I), 24)};
}
ALWAYS V lowest_byte(V v) {
    const __m256i byte = _mm256_set1_epi32(255);
    return {_mm256_and_si256(v.low, byte), _mm256_and_si256(v.high, byte)};
}
ALWAYS __m256 lookup(__m256i code, __m256i high_bit, F table) {  // of 16 values, by low bits and the sign of another
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, code), _mm256_permutevar8x32_ps(table.high, code),
                            _mm256_castsi256_ps(high_bit));
}
ALWAYS F looked_up(V v, const float* table) {
    return {_mm256_i32gather_ps(table, v.low, 4), _mm256_i32gather_ps(table, v.high, 4)};
}
ALWAYS F looked_up(V v, F table) {  // by four bits
    return {lookup(v.low, _mm256_slli_epi32(v.low, 28), table), lookup(v.high, _mm256_slli_epi32(v.high, 28), table)};
}

template <class T>
ALWAYS T held(const uint8_t* at) {
    if constexpr (std::is_same_v<T, F>)
        return load((const float*)at);
    else
        return {_mm256_load_si256((const __m256i*)at), _mm256_load_si256((const __m256i*)at + 1)};
}
ALWAYS void hold(F v, uint8_t* at) { store((float*)at, v); }
ALWAYS void hold(V v, uint8_t* at) {
    _mm256_store_si256((__m256i*)at, v.low), _mm256_store_si256((__m256i*)at + 1, v.high);
}

ALWAYS void transpose(__m256 (&v)[8]) {
    __m256 t[8];
    each<4>([&](auto i) HERE {
        const __m256 a = v[2 * i], b = v[2 * i + 1];
        t[2 * i] = _mm256_unpacklo_ps(a, b), t[2 * i + 1] = _mm256_unpackhi_ps(a, b);
    });
    each<2>([&](auto i) HERE {
        const __m256 a = t[4 * i], b = t[4 * i + 1], c = t[4 * i + 2], d = t[4 * i + 3];
        v[4 * i] = _mm256_shuffle_ps(a, c, 0x44), v[4 * i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        v[4 * i + 2] = _mm256_shuffle_ps(b, d, 0x44), v[4 * i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    });  // v[4 q + j]: lanes j and 4 + j of rows 4 q .. 4 q + 3
    each<4>([&](auto j) HERE {
        t[j] = _mm256_permute2f128_ps(v[j], v[4 + j], 0x20), t[4 + j] = _mm256_permute2f128_ps(v[j], v[4 + j], 0x31);
    });
    each<8>([&](auto i) HERE { v[i] = t[i]; });
}

ALWAYS void transpose(F (&v)[16]) {
    __m256 a[8], b[8], c[8], d[8];
    each<8>([&](auto i) HERE { a[i] = v[i].low, b[i] = v[i].high, c[i] = v[8 + i].low, d[i] = v[8 + i].high; });
    transpose(a), transpose(b), transpose(c), transpose(d);
    each<8>([&](auto i) HERE { v[i] = {a[i], c[i]}, v[8 + i] = {b[i], d[i]}; });
}

ALWAYS F sums(const F (&v)[16]) {  // lane i: of all lanes of v[i]
    F t[16];
    each<16>([&](auto i) HERE { t[i] = v[i]; });
    transpose(t);
    each<15>([&](auto i) HERE { t[0] = add(t[0], t[i + 1]); });
    return t[0];
}

}  // namespace
