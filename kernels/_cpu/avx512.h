// Sixteen lanes, as AVX-512 has them.
#pragma once

namespace {

using F = __m512;         // floats
using V = __m512i;        // words, or what is in them
using Mask = __mmask16;   // some of the lanes
constexpr int SUMS = 8;   // of one token side by side, to hide an instruction's latency
constexpr bool WIDE = true;  // 32 of these in registers

ALWAYS Mask upto(int64_t count) { return (__mmask16)((1u << std::min<int64_t>(LANES, count)) - 1); }
ALWAYS F all(float v) { return _mm512_set1_ps(v); }
ALWAYS V all(int v) { return _mm512_set1_epi32(v); }
ALWAYS F load(const float* at) { return _mm512_load_ps(at); }
ALWAYS F anywhere(const float* at) { return _mm512_loadu_ps(at); }
ALWAYS F load(const float* at, Mask some) { return _mm512_maskz_loadu_ps(some, at); }
ALWAYS F widened(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }
ALWAYS F widened(const uint16_t* at) { return widened(_mm256_loadu_si256((const __m256i*)at)); }
ALWAYS F load(const uint16_t* at, Mask some) { return widened(_mm256_maskz_loadu_epi16(some, at)); }
ALWAYS void store(float* at, F v) { _mm512_store_ps(at, v); }
ALWAYS void store(float* at, Mask some, F v) { _mm512_mask_storeu_ps(at, some, v); }
ALWAYS void store(uint16_t* at, F v) { _mm256_store_si256((__m256i*)at, (__m256i)_mm512_cvtneps_pbh(v)); }
ALWAYS void store(uint16_t* at, Mask some, F v) {
    _mm256_mask_storeu_epi16(at, some, (__m256i)_mm512_cvtneps_pbh(v));
}
ALWAYS void store(int8_t* at, Mask some, V v) { _mm_mask_storeu_epi8(at, some, _mm512_cvtepi32_epi8(v)); }
ALWAYS F add(F a, F b) { return _mm512_add_ps(a, b); }
ALWAYS V add(V a, V b) { return _mm512_add_epi32(a, b); }
ALWAYS V sub(V a, V b) { return _mm512_sub_epi32(a, b); }
ALWAYS F mul(F a, F b) { return _mm512_mul_ps(a, b); }
ALWAYS F div(F a, F b) { return _mm512_div_ps(a, b); }
ALWAYS F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS F less(F c, F a, F b) { return _mm512_fnmadd_ps(a, b, c); }
ALWAYS F min(F a, F b) { return _mm512_min_ps(a, b); }
ALWAYS F max(F a, F b) { return _mm512_max_ps(a, b); }
ALWAYS float least(F v) { return _mm512_reduce_min_ps(v); }
ALWAYS float most(F v) { return _mm512_reduce_max_ps(v); }
ALWAYS float sum(F v) { return _mm512_reduce_add_ps(v); }
ALWAYS Mask unordered(F v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
ALWAYS V nearest(F v) { return _mm512_cvtps_epi32(v); }
template <class T>
ALWAYS V held(const uint8_t* at) {
    return _mm512_load_si512(at);
}
ALWAYS void hold(V v, uint8_t* at) { _mm512_store_si512(at, v); }
ALWAYS F number(V v) { return _mm512_cvtepi32_ps(v); }
ALWAYS V words(const uint8_t* at) { return _mm512_loadu_si512(at); }
ALWAYS V halves(const uint8_t* at) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)); }
template <int BITS>
ALWAYS V right(V v) {
    return _mm512_srli_epi32(v, BITS);
}
template <int I>
ALWAYS V signed_byte(V v) {
    return _mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * I), 24);
}
ALWAYS V lowest_byte(V v) { return _mm512_and_si512(v, _mm512_set1_epi32(255)); }
ALWAYS F looked_up(V v, const float* table) { return _mm512_i32gather_ps(v, table, 4); }
ALWAYS F looked_up(V v, F table) { return _mm512_permutexvar_ps(v, table); }  // by the lowest four bits

ALWAYS void transpose(V (&v)[16]) {  // words of 16 rows
    V t[16];
    each<8>([&](auto i) HERE {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    });
    each<8>([&](auto i) HERE {
        constexpr int from = i / 2 * 4 + i % 2, to = i / 2 * 4 + i % 2 * 2;
        v[to] = _mm512_unpacklo_epi64(t[from], t[from + 2]), v[to + 1] = _mm512_unpackhi_epi64(t[from], t[from + 2]);
    });  // v[4 q + j]: word j of every four, of rows 4 q .. 4 q + 3
    each<4>([&](auto j) HERE {
        const V a = v[j], b = v[4 + j], c = v[8 + j], d = v[12 + j];
        const V low[] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd)},
                high[] = {_mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd)};
        each<2>([&](auto i) HERE {
            t[4 * i + j] = _mm512_shuffle_i32x4(low[i], high[i], 0x88);
            t[8 + 4 * i + j] = _mm512_shuffle_i32x4(low[i], high[i], 0xdd);
        });
    });
    each<16>([&](auto i) HERE { v[i] = t[i]; });
}

ALWAYS F sums(const F (&v)[16]) {  // lane i: of all lanes of v[i]
    auto four = [&](auto i) HERE {
        const __m512 a = v[i], b = v[i + 1], c = v[i + 2], d = v[i + 3],
                     low = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)),
                     high = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        return _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)low, (__m512d)high),
                             (__m512)_mm512_unpackhi_pd((__m512d)low, (__m512d)high));
    };
    auto both = [](__m512 a, __m512 b) HERE {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    using std::integral_constant;
    return both(both(four(integral_constant<int, 0>{}), four(integral_constant<int, 4>{})),
                both(four(integral_constant<int, 8>{}), four(integral_constant<int, 12>{})));
}

}  // namespace
