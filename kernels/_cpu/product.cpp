// y = x W^T with W of 4 or 8 bits, decoded in registers or, for many tokens, once into the first-level cache.
//
// W lies in blocks of 16 outputs x 8 inputs (layout.py). bfloat16 tokens are multiplied with bfloat16 values of a table
// (vdpbf16ps), int8 tokens with the codes themselves (vpdpbusd); both add in 32 bits until a group of columns ends:
//
//     y[m, n] = sx[m] (sum_g s[g, n] (sum_k x[m, k] (c[n, k] - middle) + d[g, n] sum_k x[m, k])) - zx[m] rows[n] sx[m]
//
// Needs AVX-512 with VNNI and BF16. OpenMP's functions are those of the process that loads it.
#include <algorithm>
#include <cstring>

#include "tokens.h"

namespace {

template <class W, int S, int MB, int R>
ALWAYS void step(const W& of, const typename W::Raw (&raw)[R], const uint32_t* x, typename W::Acc (&acc)[MB][R]) {
    if constexpr (S < W::PARTS) {
        V w[R];
        each<R>([&](auto r) HERE { w[r] = of.template part<S>(raw[r]); });
        each<MB>([&](auto m) HERE {
            const V token = W::token(x + (S % W::STEPS * MB + m) * W::WORDS);
            each<R>([&](auto r) HERE { W::dot(acc[m][r], w[r], token); });
        });
        step<W, S + 1, MB, R>(of, raw, x, acc);
    }
}

// One or two tokens, 16 outputs: memory is read from one end to the other, and every operand has sums of its own.
template <class W, int MB>
ALWAYS void line(const W& of, const uint8_t* w, const uint32_t* x, int64_t blocks, const float* sums, int middle, __m512 s,
                 __m512 d, bool shifted, float* C) {
    constexpr int P = W::PARTS;
    typename W::Acc acc[MB][2 * P];
    each<MB>([&](auto m) HERE { each<2 * P>([&](auto i) HERE { acc[m][i] = W::zero(); }); });
    auto one = [&](auto which, const uint8_t* w, const uint32_t* x) HERE {
        const typename W::Raw raw = of.load(w, 0);
        each<P>([&](auto i) HERE {
            const V v = of.template part<i>(raw);
            each<MB>([&](auto m) HERE { W::dot(acc[m][which * P + i], v, W::token(x + i % W::STEPS * MB + m)); });
        });
    };
    int64_t b = 0;
    for (; b + 1 < blocks; b += 2, w += 2 * W::BYTES, x += 2 * W::STEPS * MB) {
        one(std::integral_constant<int, 0>{}, w, x);
        one(std::integral_constant<int, 1>{}, w + W::BYTES, x + W::STEPS * MB);
    }
    if (b < blocks) one(std::integral_constant<int, 0>{}, w, x);
    each<MB>([&](auto m) HERE {
        each<2 * P - 1>([&](auto i) HERE { acc[m][0] = W::add(acc[m][0], acc[m][i + 1]); });
        if constexpr (W::EACH == 4) acc[m][0] = W::add(acc[m][0], _mm512_set1_epi32(-middle * (int)sums[m]));
        __m512 number = W::number(acc[m][0]);
        if (shifted) number = _mm512_fmadd_ps(d, _mm512_set1_ps(sums[m]), number);
        _mm512_store_ps(C + m * LANES, _mm512_fmadd_ps(s, number, _mm512_load_ps(C + m * LANES)));
    });
}

// MB tokens, R accumulators of outputs, some columns of one group: joins C.
template <class W, int MB, int R>
ALWAYS void chunk(const W& of, const uint8_t* w, int64_t row, const uint32_t* x, int64_t blocks, const float* sums,
                  int middle, const __m512 (&s)[R], const __m512 (&d)[R], bool shifted, float* C) {
    typename W::Acc acc[MB][R];
    each<MB>([&](auto m) HERE {
        each<R>([&](auto r) HERE {
            if constexpr (W::EACH == 4)
                acc[m][r] = _mm512_set1_epi32(-middle * (int)sums[m]);
            else
                acc[m][r] = W::zero();
        });
    });
    for (int64_t b = 0; b < blocks; ++b, w += W::BYTES, x += W::STEPS * MB * W::WORDS) {
        typename W::Raw raw[R];
        each<R>([&](auto r) HERE {
            raw[r] = of.load(w + place<W>(r * W::OUTPUTS, row), r);
        });
        step<W, 0, MB, R>(of, raw, x, acc);
    }
    each<MB>([&](auto m) HERE {
        each<R>([&](auto r) HERE {
            __m512 number = W::number(acc[m][r]);
            if (shifted) number = _mm512_fmadd_ps(d[r], _mm512_set1_ps(sums[m]), number);
            float* at = C + (m * R + r) * LANES;
            _mm512_store_ps(at, _mm512_fmadd_ps(s[r], number, _mm512_load_ps(at)));
        });
    });
}

template <int MB, int R>
void write(const Product& p, int64_t first, int64_t tile, const float* C) {
    for (int m = 0; m < MB && tile * MB + m < p.M; ++m) {
        const int64_t token = tile * MB + m;
        for (int r = 0; r < R; ++r) {
            const int64_t n = first + r * LANES;
            if (n >= p.N) break;
            const __mmask16 mask = (__mmask16)((1u << std::min<int64_t>(LANES, p.N - n)) - 1);
            __m512 y = _mm512_load_ps(C + (m * R + r) * LANES);
            if (p.zx) y = _mm512_fnmadd_ps(_mm512_set1_ps(p.zx[token]), _mm512_maskz_loadu_ps(mask, p.rows + n), y);
            if (p.sx) y = _mm512_mul_ps(y, _mm512_set1_ps(p.sx[token]));
            if (p.narrow_y)
                _mm256_mask_storeu_epi16((uint16_t*)p.y + token * p.N + n, mask, (__m256i)_mm512_cvtneps_pbh(y));
            else
                _mm512_mask_storeu_ps((float*)p.y + token * p.N + n, mask, y);
        }
    }
}

// The same where a vector of C is one output in 16 parts.
template <int MB, int R>
void write_sums(const Product& p, int64_t first, int64_t tile, const float* C) {
    static_assert(MB * R == 8 || MB * R == 16);
    __m512 v[LANES];
    each<LANES>([&](auto i) HERE { v[i] = _mm512_load_ps(C + i % (MB * R) * LANES); });
    alignas(64) float wide[LANES];
    alignas(32) uint16_t narrow[LANES];
    const __m512 y = sums(v);
    _mm512_store_ps(wide, y);
    _mm256_store_si256((__m256i*)narrow, (__m256i)_mm512_cvtneps_pbh(y));
    for (int m = 0; m < MB && tile * MB + m < p.M; ++m)
        for (int r = 0; r < R && first + r < p.N; ++r) {
            const int64_t at = (tile * MB + m) * p.N + first + r;
            if (p.narrow_y)
                ((uint16_t*)p.y)[at] = narrow[m * R + r];
            else
                ((float*)p.y)[at] = wide[m * R + r];
        }
}

// All tokens for R accumulators of outputs. ONCE: what a chunk's codes are is written down first, and serves every tile.
template <class W, class X, int MB, int R, bool ONCE>
void strip(const Product& p, const Tiles& tiles, int64_t width, int64_t first, float* C, uint8_t* held) {
    constexpr int HELD = 64 * X::STEPS * (W::INPUTS / X::INPUTS);  // bytes of a block written down
    const int64_t row = p.K / W::INPUTS * W::BYTES;              // bytes of a row of blocks
    const uint8_t* w = p.w + place<W>(first, row);
    const int64_t chunks = (p.K + width - 1) / width;  // width divides the group, or all is one group
    const bool shifted = p.d != nullptr;
    const int64_t stride = (p.N + LANES - 1) / LANES * LANES;
    std::memset(C, 0, sizeof(float) * tiles.count * MB * R * LANES);
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t k = c * width, columns = std::min(width, p.K - k), g = k / p.group, blocks = columns / W::INPUTS;
        const W of((const uint8_t*)p.table + (g * stride + first) * W::TABLE);
        __m512 s[R], d[R];
        for (int r = 0; r < R; ++r) {
            s[r] = p.s ? ranges(p.s, g * stride + first + r * LANES, p.narrow_s) : _mm512_set1_ps(1);
            d[r] = shifted ? ranges(p.d, g * stride + first + r * LANES, p.narrow_d) : _mm512_setzero_ps();
        }
        const uint8_t* from = w + k / W::INPUTS * W::BYTES;
        if constexpr (ONCE) {
            for (int r = 0; r < R; ++r) {
                for (int64_t b = 0; b < blocks; ++b)
                    hold(of, from + place<W>(r * LANES, row) + b * W::BYTES, row, r, s[r], held + (r * blocks + b) * HELD);
                if (W::PARTS > W::STEPS) s[r] = _mm512_set1_ps(1);
            }
        }
        for (int64_t t = 0; t < tiles.count; ++t) {
            const uint32_t* x = tiles.x + (t * p.K + k) / X::EACH * MB;
            const float* sums = tiles.sums + (t * chunks + c) * MB;
            float* at = C + t * MB * R * LANES;
            if constexpr (ONCE)
                chunk<X, MB, R>(X(nullptr), held, blocks * HELD, x, columns / X::INPUTS, sums, p.middle, s, d,
                                       shifted, at);
            else if constexpr (R == 1 && MB <= 2)
                line<W, MB>(of, from, x, blocks, sums, p.middle, s[0], d[0], shifted, at);
            else
                chunk<W, MB, R>(of, from, row, x, blocks, sums, p.middle, s, d, shifted, at);
        }
    }
    for (int64_t t = 0; t < tiles.count; ++t) {
        if constexpr (X::OUTPUTS == LANES)
            write<MB, R>(p, first, t, C + t * MB * R * LANES);
        else
            write_sums<MB, R>(p, first, t, C + t * MB * R * LANES);
    }
}

template <class W, int MB, int R, bool ONCE>
void multiply(const Product& p, const uint8_t* tokens, int64_t true_K) {
    using X = std::conditional_t<ONCE, Decoded<std::conditional_t<W::EACH == 2, Bf16, Int8>>, W>;  // as it meets tokens
    int64_t width = p.group;
    if (ONCE && width > 256) width = p.group >= p.K || p.group % 256 == 0 ? 256 : p.group;
    const int64_t count = (p.M + MB - 1) / MB, chunks = (p.K + width - 1) / width;
    const int64_t all = (p.N + LANES - 1) / LANES * LANES / X::OUTPUTS, strips = (all + R - 1) / R;
    auto x = buffer<uint32_t>(count * p.K / W::EACH * MB);
    auto sums = buffer<float>(count * chunks * MB);
    const Tiles tiles{x.get(), sums.get(), count};
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
    {
#pragma omp for
        for (int64_t t = 0; t < count; ++t) tile_tokens<X, MB>(tokens, p, true_K, width, t, x.get(), sums.get());
        auto C = buffer<float>(count * MB * R * LANES);
        auto held = buffer<uint8_t>(ONCE ? R * width / X::INPUTS * 64 * X::STEPS : 64);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < strips; ++i) {
            if (all - i * R >= R)
                strip<W, X, MB, R, ONCE>(p, tiles, width, i * R * X::OUTPUTS, C.get(), held.get());
            else if constexpr (X::OUTPUTS == LANES)
                for (int64_t r = i * R; r < all; ++r)
                    strip<W, X, MB, 1, ONCE>(p, tiles, width, r * X::OUTPUTS, C.get(), held.get());
        }
    }
}

template <class W, bool DECODES>
void by_tokens(const Product& p, const uint8_t* tokens, int64_t true_K) {
    if constexpr (W::OUTPUTS == 1) {
        if (p.M == 1) return multiply<W, 1, 8, false>(p, tokens, true_K);
        if (p.M <= 8) return multiply<W, 2, 8, false>(p, tokens, true_K);
    } else {
        if (p.M == 1) return multiply<W, 1, 1, false>(p, tokens, true_K);
        if (p.M == 2) return multiply<W, 2, 1, false>(p, tokens, true_K);
        if (p.M <= 4) return multiply<W, 4, 4, false>(p, tokens, true_K);
        if (p.M <= 8) return multiply<W, 8, 2, false>(p, tokens, true_K);
    }
    multiply<W, 8, 3, DECODES>(p, tokens, true_K);
}

}  // namespace

extern "C" {

// tokens: [M, true_K] bfloat16 or int8; K is true_K up to whole blocks. kind: as native.KINDS has them.
void hf_quant_product(const Product* whole, const void* tokens, int64_t true_K, int kind) {
    Product p = *whole;
    for (int64_t m = 0; m < whole->M; m += MOST) {
        p.M = std::min(MOST, whole->M - m);
        p.y = (uint8_t*)whole->y + m * p.N * (p.narrow_y ? 2 : 4);
        p.sx = whole->sx ? whole->sx + m : nullptr;
        p.zx = whole->zx ? whole->zx + m : nullptr;
        const uint8_t* x = (const uint8_t*)tokens + m * true_K * (kind < 5 ? 2 : 1);
        switch (kind) {
            case 0: by_tokens<Bf16Of4, true>(p, x, true_K); break;
            case 1: by_tokens<Bf16Split4, true>(p, x, true_K); break;
            case 2: by_tokens<Bf16OfRows, true>(p, x, true_K); break;
            case 3: by_tokens<Bf16Of8, true>(p, x, true_K); break;
            case 4: by_tokens<Bf16OfBytes, true>(p, x, true_K); break;
            case 5: by_tokens<Int8Of4, true>(p, x, true_K); break;
            case 6: by_tokens<Int8Of8, false>(p, x, true_K); break;
        }
    }
}

}
