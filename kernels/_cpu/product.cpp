// y = x W^T with W of 4 or 8 bits, decoded in registers or, for many tokens, once into the first-level cache.
//
// W lies in blocks of 16 outputs x 8 inputs (layout.py). bfloat16 tokens are multiplied with bfloat16 values of a table
// (vdpbf16ps), int8 tokens with the codes themselves (vpdpbusd); both add in 32 bits until a group of columns ends:
//
//     y[m, n] = sx[m] (tensor sum_g s[g, n] (sum_k x[m, k] (c[n, k] - middle) + d[g, n] sum_k x[m, k]) - zx[m] rows[n])
//
// Needs AVX-512 with VNNI and BF16. OpenMP's functions are those of the process that loads it.
#include <algorithm>
#include <atomic>
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

// One or two tokens, 16 outputs, all columns: memory is read from one end to the other, into as many sums as hide their
// latency. Where groups are short, those of the next ones hide it, too.
template <class W, int MB, int SUMS>
ALWAYS void line(const Product& p, const Tiles& tiles, int64_t width, int64_t first, float* C) {
    const W of(p.table);
    const uint8_t* w = p.w + place<W>(first, p.K / W::INPUTS * W::BYTES);
    const uint32_t* x = tiles.x;
    const float* sums = tiles.sums;
    __m512 total[MB];
    each<MB>([&](auto m) HERE { total[m] = _mm512_setzero_ps(); });
    auto group = [&](int64_t blocks, int64_t at) HERE {
        typename W::Acc acc[MB][SUMS];
        each<MB>([&](auto m) HERE { each<SUMS>([&](auto i) HERE { acc[m][i] = W::zero(); }); });
        auto block = [&](auto which) HERE {
            const typename W::Raw raw = of.load(w, 0);
            each<W::PARTS>([&](auto i) HERE {
                constexpr int sum = (which * W::PARTS + i) % SUMS;
                const V v = of.template part<i>(raw);
                each<MB>([&](auto m) HERE { W::dot(acc[m][sum], v, W::token(x + i % W::STEPS * MB + m)); });
            });
            w += W::BYTES, x += W::STEPS * MB;
        };
        const std::integral_constant<int, 0> even;
        const std::integral_constant<int, 1> odd;
        for (; blocks >= 2; blocks -= 2) block(even), block(odd);
        if (blocks) block(even);
        const __m512 s = ranges(p.s, at, p.narrow_s);
        each<MB>([&](auto m) HERE {
            each<SUMS - 1>([&](auto i) HERE { acc[m][0] = W::add(acc[m][0], acc[m][i + 1]); });
            if constexpr (W::EACH == 4) acc[m][0] = W::add(acc[m][0], _mm512_set1_epi32(-p.middle * (int)sums[m]));
            __m512 number = W::number(acc[m][0]);
            if (p.d) number = _mm512_fmadd_ps(ranges(p.d, at, p.narrow_d), _mm512_set1_ps(sums[m]), number);
            total[m] = _mm512_fmadd_ps(s, number, total[m]);
        });
        sums += MB;
    };
    int64_t k = 0, at = p.at(0, first);
    for (; k + width <= p.K; k += width, at += LANES) group(width / W::INPUTS, at);
    if (k < p.K) group((p.K - k) / W::INPUTS, at);
    each<MB>([&](auto m) HERE { _mm512_store_ps(C + m * LANES, total[m]); });
}

template <class W, int MB>
void line(const Product& p, const Tiles& tiles, int64_t width, int64_t first, float* C) {
    if (width <= 4 * W::INPUTS) return line<W, MB, 2>(p, tiles, width, first, C);
    line<W, MB, std::min(8, 2 * W::PARTS)>(p, tiles, width, first, C);
}

// MB tokens, R accumulators of outputs, some columns of one group: joins C.
template <class W, int MB, int R>
ALWAYS void chunk(const W& of, const uint8_t* w, int64_t row, const uint32_t* x, int64_t blocks, const float* sums,
                  const Product& p, const __m512 (&s)[R], const __m512 (&d)[R], float* C) {
    typename W::Acc acc[MB][R];
    each<MB>([&](auto m) HERE {
        each<R>([&](auto r) HERE {
            if constexpr (W::EACH == 4)
                acc[m][r] = _mm512_set1_epi32(-p.middle * (int)sums[m]);
            else
                acc[m][r] = W::zero();
        });
    });
    for (int64_t b = 0; b < blocks; ++b, w += W::BYTES, x += W::STEPS * MB * W::WORDS) {
        typename W::Raw raw[R];
        each<R>([&](auto r) HERE { raw[r] = of.load(w + place<W>(r * W::OUTPUTS, row), r); });
        step<W, 0, MB, R>(of, raw, x, acc);
    }
    each<MB>([&](auto m) HERE {
        each<R>([&](auto r) HERE {
            __m512 number = W::number(acc[m][r]);
            if (p.d) number = _mm512_fmadd_ps(d[r], _mm512_set1_ps(sums[m]), number);
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
            if (p.tensor) y = _mm512_mul_ps(y, _mm512_set1_ps(*p.tensor));
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

// All tokens for R accumulators of outputs. ONCE: what a chunk's codes are is written down first, for all tiles.
template <class W, class X, int MB, int R, bool ONCE>
void strip(const Product& p, const Tiles& tiles, int64_t width, int64_t first, float* C, uint8_t* held) {
    constexpr bool SCALED = ONCE && W::SCALED;
    constexpr int HELD = 64 * X::STEPS * (W::INPUTS / X::INPUTS);  // bytes of a block written down
    const int64_t row = p.K / W::INPUTS * W::BYTES;                // bytes of a row of blocks
    const int64_t chunks = (p.K + width - 1) / width;
    std::memset(C, 0, sizeof(float) * tiles.count * MB * R * LANES);
    for (int64_t c = 0, g = 0; c < chunks; ++c) {
        const int64_t k = c * width, columns = std::min(width, p.K - k), blocks = columns / W::INPUTS;
        g += k >= (g + 1) * p.group;
        const W of((const uint8_t*)p.table + p.at(g, first) * W::TABLE);
        const uint8_t* w = p.w + place<W>(first, row) + k / W::INPUTS * W::BYTES;
        __m512 s[R], d[R];
        for (int r = 0; r < R; ++r) {
            s[r] = SCALED || !p.s ? _mm512_set1_ps(1) : ranges(p.s, p.at(g, first + r * LANES), p.narrow_s);
            d[r] = p.d ? ranges(p.d, p.at(g, first + r * LANES), p.narrow_d) : _mm512_setzero_ps();
        }
        if constexpr (ONCE)
            for (int r = 0; r < R; ++r) {
                const W of((const uint8_t*)p.table + p.at(g, first + r * LANES) * W::TABLE);
                const uint8_t* from = w + place<W>(r * LANES, row);
                for (int64_t b = 0, end; b < blocks; b = end) {  // as far as scales reach, where they are multiplied
                    const int64_t own = SCALED ? (k + b * W::INPUTS) / p.group : g;
                    end = SCALED ? std::min(blocks, ((own + 1) * p.group - k) / W::INPUTS) : blocks;
                    const __m512 scale = SCALED ? ranges(p.s, p.at(own, first + r * LANES), p.narrow_s) : s[r];
                    for (; b < end; ++b) hold(of, from + b * W::BYTES, row, scale, held + (r * blocks + b) * HELD);
                }
            }
        for (int64_t t = 0; t < tiles.count; ++t) {
            const uint32_t* x = tiles.x + (t * p.K + k) / X::EACH * MB;
            const float* sums = tiles.sums + (t * chunks + c) * MB;
            float* at = C + t * MB * R * LANES;
            if constexpr (ONCE)
                chunk<X, MB, R>(X(nullptr), held, blocks * HELD, x, columns / X::INPUTS, sums, p, s, d, at);
            else
                chunk<W, MB, R>(of, w, row, x, blocks, sums, p, s, d, at);
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
void multiply(const Product& p, const uint8_t* tokens) {
    using X = std::conditional_t<ONCE, Decoded<std::conditional_t<W::EACH == 2, Bf16, Int8>>, W>;  // as it meets tokens
    constexpr bool LINE = !ONCE && R == 1 && MB <= 2;
    int64_t width = std::min(p.group, p.K);
    if (ONCE && (W::SCALED || width == p.K || width % 256 == 0)) width = 256;
    const int64_t count = (p.M + MB - 1) / MB, chunks = (p.K + width - 1) / width;
    const int64_t all = p.units() * LANES / X::OUTPUTS, strips = (all + R - 1) / R;
    auto x = buffer<uint32_t>(count * p.K / W::EACH * MB);
    auto sums = buffer<float>(count * chunks * MB);
    const Tiles tiles{x.get(), sums.get(), count};
    std::atomic<int64_t> tile{0}, turn{0};
    together(count > 1 ? p.threads : 1, [&] {
        for (int64_t t; (t = tile++) < count;) tile_tokens<X, MB>(tokens, p, width, t, x.get(), sums.get());
    });
    together(p.threads, [&] {
        auto C = buffer<float>(count * MB * R * LANES);
        auto held = buffer<uint8_t>(ONCE ? R * width / X::INPUTS * 64 * X::STEPS : 64);
        for (int64_t i; (i = turn++) < strips;) {
            if constexpr (LINE) {
                line<W, MB>(p, tiles, width, i * LANES, C.get());
                write<MB, 1>(p, i * LANES, 0, C.get());
            } else if (all - i * R >= R)
                strip<W, X, MB, R, ONCE>(p, tiles, width, i * R * X::OUTPUTS, C.get(), held.get());
            else if constexpr (X::OUTPUTS == LANES)
                for (int64_t r = i * R; r < all; ++r)
                    strip<W, X, MB, 1, ONCE>(p, tiles, width, r * LANES, C.get(), held.get());
        }
    });
}

template <class W, bool DECODES>
void by_tokens(const Product& p, const uint8_t* tokens) {
    if constexpr (W::OUTPUTS == 1) {
        if (p.M == 1) return multiply<W, 1, 8, false>(p, tokens);
        if (p.M <= 8) return multiply<W, 2, 8, false>(p, tokens);
    } else {
        if (p.M == 1) return multiply<W, 1, 1, false>(p, tokens);
        if (p.M == 2) return multiply<W, 2, 1, false>(p, tokens);
        if (p.M <= 4) return multiply<W, 4, 4, false>(p, tokens);
        if (p.M <= 8 && W::PARTS == W::STEPS) return multiply<W, 8, 2, false>(p, tokens);
    }
    multiply<W, 8, 3, DECODES>(p, tokens);
}

}  // namespace

extern "C" void hf_quant_product(const Product* whole) {
    Product p = *whole;
    Buffer<int8_t> codes;
    Buffer<float> ranges;
    if (p.high > p.low) {
        codes = buffer<int8_t>(p.M * p.inputs), ranges = buffer<float>(2 * p.M);
        float* zero = p.asymmetric ? ranges.get() + p.M : nullptr;
        hf_quant_tokens(p.x, p.narrow_x, p.M, p.inputs, p.low, p.high, codes.get(), ranges.get(), zero, p.threads);
        p.x = codes.get(), p.sx = ranges.get(), p.zx = zero;
    }
    for (int64_t m = 0; m < whole->M; m += MOST) {
        p.M = std::min(MOST, whole->M - m);
        const uint8_t* x = (const uint8_t*)p.x + m * p.inputs * (p.kind < 6 ? 2 : 1);
        switch (p.kind) {
            case 0: by_tokens<Bf16Of4, true>(p, x); break;
            case 1: by_tokens<Bf16Scaled4, true>(p, x); break;
            case 2: by_tokens<Bf16Split4, true>(p, x); break;
            case 3: by_tokens<Bf16OfRows, true>(p, x); break;
            case 4: by_tokens<Bf16Of8, true>(p, x); break;
            case 5: by_tokens<Bf16OfBytes, true>(p, x); break;
            case 6: by_tokens<Int8Of4, true>(p, x); break;
            case 7: by_tokens<Int8Of8, false>(p, x); break;
        }
        p.y = (uint8_t*)p.y + p.M * p.N * (p.narrow_y ? 2 : 4);
        p.sx = p.sx ? p.sx + p.M : nullptr;
        p.zx = p.zx ? p.zx + p.M : nullptr;
    }
}
