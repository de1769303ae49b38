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

// Of some inputs of a token, where it is asked for.
template <class W>
ALWAYS float sum_of(const uint8_t* from, int64_t count, const Product& p) {
    const auto* at = (const typename W::Token*)from;
    if constexpr (W::INTEGERS) {
        int whole = 0;
        for (int64_t i = 0; i < count; ++i) whole += at[i];
        return (float)whole;
    } else {
        F total = all(0.0f);
        for (int64_t i = 0; p.d && i < count; i += LANES) total = add(total, load(at + i, upto(count - i)));
        return sum(total);
    }
}

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
            sums[c * MB + m] = sum_of<W>(from + k * SIZE, end - k, p);
        }
    }
}

}  // namespace

extern "C" {

// Tokens [M, K] onto the grid low .. high: code = clamp(round(x / scale + zero)), scale and zero of each token (none
// where zero is null); codes and zeros less 128 where they would not fit a signed byte. The ranges are those of `fixed`
// and `fixed_zero`, where they are given, else each token's own. A token with NaN has a scale that is NaN.
void hf_quant_tokens(const void* x, int64_t narrow, int64_t M, int64_t K, int64_t low, int64_t high, const float* fixed,
                     const float* fixed_zero, int8_t* codes, float* scale, float* zero, int64_t threads) {
    const int shift = high > 127 ? 128 : 0;
    const bool asymmetric = zero != nullptr;
    auto values = [=](int64_t i, Mask some) {
        return narrow ? load((const uint16_t*)x + i, some) : load((const float*)x + i, some);
    };
    auto range = [&](int64_t m, float& step, float& z) {
        if (fixed) {
            step = fixed[m], z = fixed_zero ? fixed_zero[m] : 0;
            return;
        }
        F low_F = all(0.0f), high_F = all(0.0f);
        for (int64_t k = 0; k < K; k += LANES) {
            const F v = values(m * K + k, upto(K - k));
            low_F = min(low_F, v), high_F = max(high_F, v);
        }
        const float l = least(low_F), h = most(high_F);
        step = asymmetric ? (h - l) / (float)(high - low) : low == 0 ? h / high : std::max(l / low, h / high);
        step = step > 0 ? step : 1.0f;
        z = asymmetric ? std::nearbyint(std::min(std::max(low - l / step, (float)low), (float)high)) : 0;
    };
    std::atomic<int64_t> turn{0};
    auto token = [&](int64_t m) {
        float step, z;
        range(m, step, z);
        const F by = all(step), zeros = all(z), lows = all((float)low), highs = all((float)high);
        const V off = all(shift);
        Mask nan = 0;
        for (int64_t k = 0; k < K; k += LANES) {
            const Mask some = upto(K - k);
            const F v = values(m * K + k, some), steps = add(div(v, by), zeros);
            nan |= unordered(v);
            store(codes + m * K + k, some, sub(nearest(min(max(steps, lows), highs)), off));
        }
        scale[m] = nan ? NAN : step;
        if (asymmetric) zero[m] = z - shift;
    };
    together(M > 1 ? threads : 1, [&] {
        for (int64_t m; (m = turn++) < M;) token(m);
    });
}
}
