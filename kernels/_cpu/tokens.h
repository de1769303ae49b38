#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "operands.h"

namespace {

// Tokens in tiles: uint32 [tiles, K / EACH / WORDS, MB, WORDS], and their sums over every chunk of columns
// [tiles, chunks, MB].
struct Tiles {
    const uint32_t* x;
    const float* sums;
    int64_t count;
};

template <class W, int MB>
void tile_tokens(const uint8_t* tokens, const Product& p, int64_t width, int64_t t, uint32_t* x, float* sums) {
    constexpr int SIZE = 4 / W::EACH;
    const int64_t words = p.K / W::EACH, whole = p.inputs / W::EACH, chunks = (p.K + width - 1) / width;
    x += t * words * MB, sums += t * chunks * MB;
    auto place = [](int64_t i, int m) { return (i / W::WORDS * MB + m) * W::WORDS + i % W::WORDS; };
    for (int m = 0; m < MB; ++m) {
        const int64_t token = t * MB + m;
        const uint8_t* from = tokens + token * p.inputs * SIZE;
        const int64_t have = token < p.M ? whole : 0;
        for (int64_t i = 0; i < have; ++i) std::memcpy(x + place(i, m), from + i * 4, 4);
        for (int64_t i = have; i < words; ++i) x[place(i, m)] = 0;
        if (token < p.M && whole * W::EACH < p.inputs)
            std::memcpy(x + place(whole, m), from + whole * 4, (p.inputs - whole * W::EACH) * SIZE);
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t k = c * width, end = token < p.M ? std::min(k + width, p.inputs) : k;
            float sum = 0;
            if constexpr (W::EACH == 4) {
                int whole_sum = 0;
                for (int64_t i = k; i < end; ++i) whole_sum += ((const int8_t*)from)[i];
                sum = (float)whole_sum;
            } else if (p.d) {
                __m512 total = _mm512_setzero_ps();
                const uint16_t* at = (const uint16_t*)from;
                for (int64_t i = k; i < end; i += 16) {
                    __mmask16 mask = (__mmask16)((1u << std::min<int64_t>(16, end - i)) - 1);
                    total = _mm512_add_ps(total, widened(_mm256_maskz_loadu_epi16(mask, at + i)));
                }
                sum = _mm512_reduce_add_ps(total);
            }
            sums[c * MB + m] = sum;
        }
    }
}

}  // namespace

extern "C" {

// Tokens [M, K] onto the grid low .. high: code = clamp(round(x / scale + zero)), scale and zero of each token (none
// where zero is null); codes and zeros less 128 where they would not fit a signed byte.
void hf_quant_tokens(const void* x, int64_t narrow, int64_t M, int64_t K, int64_t low, int64_t high, int8_t* codes,
                     float* scale, float* zero, int64_t threads) {
    const int shift = high > 127 ? 128 : 0;
    const bool asymmetric = zero != nullptr;
    auto load = [=](int64_t i, __mmask16 mask) {
        if (narrow) return widened(_mm256_maskz_loadu_epi16(mask, (const uint16_t*)x + i));
        return _mm512_maskz_loadu_ps(mask, (const float*)x + i);
    };
    std::atomic<int64_t> turn{0};
    auto token = [&](int64_t m) {
        __m512 least = _mm512_setzero_ps(), most = _mm512_setzero_ps();
        __mmask16 unordered = 0;
        for (int64_t k = 0; k < K; k += 16) {
            __m512 v = load(m * K + k, (__mmask16)((1u << std::min<int64_t>(16, K - k)) - 1));
            least = _mm512_min_ps(least, v), most = _mm512_max_ps(most, v);
            unordered |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        }
        const float l = _mm512_reduce_min_ps(least), h = _mm512_reduce_max_ps(most);
        float step = asymmetric ? (h - l) / (float)(high - low) : low == 0 ? h / high : std::max(l / low, h / high);
        step = step > 0 ? step : 1.0f;
        const float z = asymmetric ? std::nearbyint(std::min(std::max(low - l / step, (float)low), (float)high)) : 0;
        scale[m] = unordered ? NAN : step;
        if (asymmetric) zero[m] = z - shift;
        const __m512 by = _mm512_set1_ps(step), zeros = _mm512_set1_ps(z), lows = _mm512_set1_ps((float)low),
                     highs = _mm512_set1_ps((float)high);
        const __m512i off = _mm512_set1_epi32(shift);
        for (int64_t k = 0; k < K; k += 16) {
            __mmask16 mask = (__mmask16)((1u << std::min<int64_t>(16, K - k)) - 1);
            __m512 v = _mm512_add_ps(_mm512_div_ps(load(m * K + k, mask), by), zeros);
            v = _mm512_min_ps(_mm512_max_ps(v, lows), highs);
            __m512i code = _mm512_sub_epi32(_mm512_cvtps_epi32(v), off);
            _mm_mask_storeu_epi8(codes + m * K + k, mask, _mm512_cvtepi32_epi8(code));
        }
    };
    together(M > 1 ? threads : 1, [&] {
        for (int64_t m; (m = turn++) < M;) token(m);
    });
}
}
