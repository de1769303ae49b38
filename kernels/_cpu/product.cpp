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

#include "amx.h"
#include "tokens.h"
#include "unfold.h"

namespace {

template <class W, int S, int MB, int R>
ALWAYS void step(const W& of, const typename W::Raw (&raw)[R], const uint32_t* x, typename W::Acc (&acc)[MB][R]) {
    if constexpr (S < W::PARTS) {
        typename W::Operand w[R];
        each<R>([&](auto r) HERE { w[r] = of.template part<S>(raw[r]); });
        each<MB>([&](auto m) HERE {
            const auto token = W::token(x + (S % W::STEPS * MB + m) * W::WORDS);
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
    F total[MB];
    each<MB>([&](auto m) HERE { total[m] = all(0.0f); });
    auto group = [&](int64_t blocks, int64_t at) HERE {
        typename W::Acc acc[MB][SUMS];
        each<MB>([&](auto m) HERE { each<SUMS>([&](auto i) HERE { acc[m][i] = W::zero(); }); });
        auto block = [&](auto which) HERE {
            each<W::BYTES / 64>([&](auto i) HERE { ahead(w + 64 * i); });
            const typename W::Raw raw = of.load(w, 0);
            each<W::PARTS>([&](auto i) HERE {
                constexpr int sum = (which * W::PARTS + i) % SUMS;
                const auto v = of.template part<i>(raw);
                each<MB>([&](auto m) HERE { W::dot(acc[m][sum], v, W::token(x + i % W::STEPS * MB + m)); });
            });
            w += W::BYTES, x += W::STEPS * MB;
        };
        const std::integral_constant<int, 0> even;
        const std::integral_constant<int, 1> odd;
        for (; blocks >= 2; blocks -= 2) block(even), block(odd);
        if (blocks) block(even);
        const F s = ranges(p.s, at, p.narrow_s);
        each<MB>([&](auto m) HERE {
            each<SUMS - 1>([&](auto i) HERE { acc[m][0] = add(acc[m][0], acc[m][i + 1]); });
            if constexpr (W::INTEGERS) acc[m][0] = add(acc[m][0], all((int)(-p.middle * (int)sums[m])));
            F number = W::number(acc[m][0]);
            if (p.d) number = fma(ranges(p.d, at, p.narrow_d), all(sums[m]), number);
            total[m] = fma(s, number, total[m]);
        });
        sums += MB;
    };
    int64_t k = 0, at = p.at(0, first);
    for (; k + width <= p.K; k += width, at += LANES) group(width / W::INPUTS, at);
    if (k < p.K) group((p.K - k) / W::INPUTS, at);
    each<MB>([&](auto m) HERE { store(C + m * LANES, total[m]); });
}

template <class W, int MB>
void line(const Product& p, const Tiles& tiles, int64_t width, int64_t first, float* C) {
    if (width <= 4 * W::INPUTS) return line<W, MB, 2>(p, tiles, width, first, C);
    line<W, MB, std::min(SUMS, 2 * W::PARTS)>(p, tiles, width, first, C);
}

// MB tokens, R accumulators of outputs, some columns of one group: joins C.
template <class W, int MB, int R>
ALWAYS void chunk(const W& of, const uint8_t* w, int64_t row, const uint32_t* x, int64_t blocks, const float* sums,
                  const Product& p, const F (&s)[R], const F (&d)[R], float* C) {
    typename W::Acc acc[MB][R];
    each<MB>([&](auto m) HERE {
        each<R>([&](auto r) HERE {
            if constexpr (W::INTEGERS)
                acc[m][r] = all((int)(-p.middle * (int)sums[m]));
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
            F number = W::number(acc[m][r]);
            if (p.d) number = fma(d[r], all(sums[m]), number);
            float* at = C + (m * R + r) * LANES;
            store(at, fma(s[r], number, load(at)));
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
            const Mask some = upto(p.N - n);
            F y = load(C + (m * R + r) * LANES);
            if (p.tensor) y = mul(y, all(*p.tensor));
            if (p.zx) y = less(y, all(p.zx[token]), load(p.rows + n, some));
            if (p.sx) y = mul(y, all(p.sx[token]));
            if (p.narrow_y)
                store((uint16_t*)p.y + token * p.N + n, some, y);
            else
                store((float*)p.y + token * p.N + n, some, y);
        }
    }
}

// The same where a vector of C is one output in 16 parts.
template <int MB, int R>
void write_sums(const Product& p, int64_t first, int64_t tile, const float* C) {
    F v[LANES];
    each<LANES>([&](auto i) HERE { v[i] = load(C + i % (MB * R) * LANES); });
    alignas(64) float wide[LANES];
    alignas(32) uint16_t narrow[LANES];
    const F y = sums(v);
    store(wide, y);
    store(narrow, y);
    for (int m = 0; m < MB && tile * MB + m < p.M; ++m)
        for (int r = 0; r < R && first + r < p.N; ++r) {
            const int64_t at = (tile * MB + m) * p.N + first + r;
            if (p.narrow_y)
                ((uint16_t*)p.y)[at] = narrow[m * R + r];
            else
                ((float*)p.y)[at] = wide[m * R + r];
        }
}

// What the codes of 16 outputs and some columns of a group are, operand by operand; whole tiles of them, the rest 0.
template <class W, class X>
ALWAYS void put_down(const Product& p, int64_t n, int64_t k, int64_t columns, int64_t g, uint8_t* to) {
    constexpr int HELD = 64 * X::STEPS * (W::INPUTS / X::INPUTS);  // bytes of a block written down
    const int64_t row = p.K / W::INPUTS * W::BYTES, blocks = columns / W::INPUTS;
    const W of((const uint8_t*)p.table + p.at(g, n) * W::TABLE);
    const uint8_t* from = p.w + place<W>(n, row) + k / W::INPUTS * W::BYTES;
    for (int64_t b = 0, end; b < blocks; b = end) {  // as far as scales reach, where they are multiplied
        const int64_t own = W::SCALED ? (k + b * W::INPUTS) / p.group : g;
        end = W::SCALED ? std::min(blocks, ((own + 1) * p.group - k) / W::INPUTS) : blocks;
        const F scale = W::SCALED ? ranges(p.s, p.at(own, n), p.narrow_s) : all(1.0f);
        for (; b < end; ++b, to += HELD) hold(of, from + b * W::BYTES, row, scale, to);
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
        F s[R], d[R];
        for (int r = 0; r < R; ++r) {
            s[r] = SCALED || !p.s ? all(1.0f) : ranges(p.s, p.at(g, first + r * LANES), p.narrow_s);
            d[r] = p.d ? ranges(p.d, p.at(g, first + r * LANES), p.narrow_d) : all(0.0f);
        }
        if constexpr (ONCE)
            for (int r = 0; r < R; ++r) put_down<W, X>(p, first + r * LANES, k, columns, g, held + r * blocks * HELD);
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
    using X = std::conditional_t<ONCE, Decoded<typename W::As>, W>;  // as it meets tokens
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

#ifdef __AMX_TILE__
// The same with tiles. What codes are is written down for 16 R outputs and some columns of a group; 16 A tokens at a time
// pass over it.
template <class W, int A, int R>
ALWAYS void square(const Product& p, const uint8_t* x, int64_t rows, const uint8_t* w, int64_t row, int64_t steps,
                   const float* sums, int64_t next, const F (&s)[2], const F (&d)[2], int tokens, float* C, uint8_t* scratch) {
    constexpr int64_t STRIDE = 2 * LANES * sizeof(float);
    each<A * R>([&](auto i) HERE {
        constexpr int a = i / R, r = i % R;
        if constexpr (W::SCALED)
            tile_load<a * 2 + r>(C + (a * SIDE * 2 + r) * LANES, STRIDE);
        else
            tile_zero<a * 2 + r>();
    });
    dots<W::INTEGERS, A, R>(x, rows, w, row, steps);
    each<A * R>([&](auto i) HERE {
        constexpr int a = i / R, r = i % R;
        float* to = C + (a * SIDE * 2 + r) * LANES;
        if constexpr (W::SCALED) return tile_store<a * 2 + r>(to, STRIDE);
        tile_store<a * 2 + r>(scratch, 64);
        for (int m = 0; m < tokens; ++m, to += 2 * LANES) {
            auto acc = (typename W::Acc)held<V>(scratch + 64 * m);
            const float of = sums[a * next + m];
            if constexpr (W::INTEGERS) acc = add(acc, all((int)(-p.middle * (int)of)));
            F number = W::number(acc);
            if (p.d) number = fma(d[r], all(of), number);
            store(to, fma(s[r], number, load(to)));
        }
    });
}

template <class W>
void in_tiles(const Product& p, const uint8_t* tokens) {
    using X = Decoded<typename W::As>;
    constexpr int INPUTS = 16 * X::EACH, WIDEST = 16 * INPUTS;  // of a tile; written down at once
    int64_t width = std::min(p.group, p.K);
    if (W::SCALED || width == p.K || width % WIDEST == 0) width = std::min<int64_t>(WIDEST, p.K);
    const int64_t count = (p.M + SIDE - 1) / SIDE, chunks = (p.K + width - 1) / width;
    const int64_t steps = (width + INPUTS - 1) / INPUTS, row = p.K / W::INPUTS * W::BYTES;
    const int64_t units = p.units(), strips = (units + 1) / 2;
    const int high = (int)std::min<int64_t>(SIDE, p.M);  // rows of a tile
    auto x = buffer<uint8_t>(count * chunks * steps * TILE);
    auto sums = buffer<float>(count * chunks * SIDE);
    std::atomic<int64_t> tile{0}, turn{0};
    together(count > 1 ? p.threads : 1, [&] {
        for (int64_t t; (t = tile++) < count;) tokens_of_tile<X>(tokens, p, width, steps, t, x.get(), sums.get());
    });
    together(p.threads, [&] {
        const Configured tiles(high);
        auto C = buffer<float>(count * SIDE * 2 * LANES);
        auto panel = buffer<uint8_t>(2 * steps * TILE), scratch = buffer<uint8_t>(TILE);
        for (int64_t i; (i = turn++) < strips;) {
            const int64_t first = i * 2 * LANES, side = std::min<int64_t>(2, units - i * 2);
            std::memset(C.get(), 0, sizeof(float) * count * SIDE * 2 * LANES);
            for (int64_t c = 0, g = 0; c < chunks; ++c) {
                const int64_t k = c * width, columns = std::min(width, p.K - k);
                g += k >= (g + 1) * p.group;
                F s[2], d[2];
                const uint8_t* w = panel.get();
                int64_t apart = steps * TILE;
                const bool direct = !W::DECODES && columns % INPUTS == 0;
                if (direct) w = p.w + i * 2 * row + k / W::INPUTS * W::BYTES, apart = row;
                for (int64_t r = 0; r < side; ++r) {
                    const int64_t n = first + r * LANES;
                    s[r] = W::SCALED || !p.s ? all(1.0f) : ranges(p.s, p.at(g, n), p.narrow_s);
                    d[r] = p.d ? ranges(p.d, p.at(g, n), p.narrow_d) : all(0.0f);
                    if (direct) continue;
                    uint8_t* to = panel.get() + r * steps * TILE;
                    put_down<W, X>(p, n, k, columns, g, to);
                    std::memset(to + columns / INPUTS * TILE + columns % INPUTS / X::EACH * 64, 0, (INPUTS - columns % INPUTS) % INPUTS / X::EACH * 64);
                }
                const int64_t deep = (columns + INPUTS - 1) / INPUTS;
                for (int64_t t = 0; t < count; t += 2) {
                    const uint8_t* at = x.get() + (t * chunks + c) * steps * TILE;
                    const float* of = sums.get() + (t * chunks + c) * SIDE;
                    float* to = C.get() + t * SIDE * 2 * LANES;
                    const int64_t rows = chunks * steps * TILE, next = chunks * SIDE;
                    auto with = [&](auto a, auto r) HERE {
                        square<W, a, r>(p, at, rows, w, apart, deep, of, next, s, d, high, to, scratch.get());
                    };
                    const std::integral_constant<int, 1> one;
                    const std::integral_constant<int, 2> two;
                    if (side == 2)
                        t + 1 < count ? with(two, two) : with(one, two);
                    else
                        t + 1 < count ? with(two, one) : with(one, one);
                }
            }
            for (int64_t t = 0; t < count; ++t) write<SIDE, 2>(p, first, t, C.get() + t * SIDE * 2 * LANES);
        }
    });
}
#endif

template <class W>
void by_tokens(const Product& p, const uint8_t* tokens) {
#ifdef __AMX_TILE__
    if (p.M > W::FEW && have_tiles()) return in_tiles<W>(p, tokens);
#endif
    if constexpr (W::OUTPUTS == 1) {
        if (p.M == 1) return multiply<W, 1, WIDE ? 8 : 4, false>(p, tokens);
        if (p.M <= (WIDE ? 8 : 2)) return multiply<W, 2, WIDE ? 8 : 2, false>(p, tokens);
    } else {
        if (p.M == 1) return multiply<W, 1, 1, false>(p, tokens);
        if (p.M == 2) return multiply<W, 2, 1, false>(p, tokens);
        if constexpr (WIDE) {
            if (p.M <= 4) return multiply<W, 4, 4, false>(p, tokens);
            if (p.M <= 8 && W::PARTS == W::STEPS) return multiply<W, 8, 2, false>(p, tokens);
        }
    }
    if constexpr (WIDE)
        multiply<W, 8, 3, W::DECODES>(p, tokens);
    else if (p.M <= 4 || p.M == 7 || p.M == 8)
        multiply<W, 4, 1, true>(p, tokens);
    else
        multiply<W, 6, 1, true>(p, tokens);
}

}  // namespace

extern "C" void hf_quant_product(const Product* whole) {
    Product p = *whole;
    Buffer<int8_t> codes;
    Buffer<uint8_t> own;
    Buffer<float> ranges;
    if (p.high > p.low) {
        codes = buffer<int8_t>(p.M * p.inputs), ranges = buffer<float>(2 * p.M);
        float* zero = p.asymmetric ? ranges.get() + p.M : nullptr;
        hf_quant_tokens(p.x, p.narrow_x, p.M, p.inputs, p.low, p.high, p.sx, p.zx, codes.get(), ranges.get(), zero,
                        p.threads);
        p.x = codes.get(), p.sx = ranges.get(), p.zx = zero;
    }
    const int64_t most = at_once(p);
    for (int64_t m = 0; m < whole->M; m += most) {
        p.M = std::min(most, whole->M - m), p.inputs = whole->inputs;
        const uint8_t* x = as_operands((const uint8_t*)p.x + m * p.inputs * p.bytes(), p, own);
        switch (p.kind) {
            case 0: by_tokens<Of4>(p, x); break;
            case 1: by_tokens<Scaled4>(p, x); break;
            case 2: by_tokens<Floats4>(p, x); break;
            case 3: by_tokens<OfRows>(p, x); break;
            case 4: of_bytes(p.table, [&](auto* of) HERE { by_tokens<std::decay_t<decltype(*of)>>(p, x); }); break;
            case 5: by_tokens<OfBytes>(p, x); break;
            case 6: by_tokens<Nibbles>(p, x); break;
            case 7: by_tokens<Bytes>(p, x); break;
        }
        p.y = (uint8_t*)p.y + p.M * p.N * (p.narrow_y ? 2 : 4);
        p.sx = p.sx ? p.sx + p.M : nullptr;
        p.zx = p.zx ? p.zx + p.M : nullptr;
    }
}
