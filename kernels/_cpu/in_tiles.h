// Many tokens on processors with AMX: what the codes of 32 outputs and some columns are is written down, and 32 tokens
// at a time pass over it.
#pragma once
#include <cstring>

#include "amx.h"
#include "operands.h"
#include "outputs.h"
#include "tokens.h"

#ifdef __AMX_TILE__
namespace {

// Tokens in tiles, uint8 [tiles, chunks, steps, 16, 64], their sums over every chunk [tiles, chunks, 16]; what is
// missing is 0.
template <class X>
void tokens_of_tile(const uint8_t* tokens, const Product& p, int64_t width, int64_t steps, int64_t t, uint8_t* x,
                    float* sums) {
    constexpr int SIZE = 4 / X::EACH;
    const int64_t chunks = (p.K + width - 1) / width;
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t k = c * width, bytes = std::max<int64_t>(0, std::min(width, p.inputs - k)) * SIZE;
        uint8_t* to = x + (t * chunks + c) * steps * TILE;
        for (int m = 0; m < SIDE; ++m) {
            const bool there = t * SIDE + m < p.M;
            const uint8_t* from = tokens + ((t * SIDE + m) * p.inputs + k) * SIZE;
            for (int64_t s = 0; s < steps; ++s) {
                const int64_t some = there ? std::min<int64_t>(64, std::max<int64_t>(0, bytes - s * 64)) : 0;
                uint8_t* row = to + s * TILE + m * 64;
                if (some == 64)
                    _mm512_store_si512(row, _mm512_loadu_si512(from + s * 64));
                else
                    _mm512_store_si512(row, _mm512_maskz_loadu_epi8((1ull << some) - 1, from + s * 64));
            }
            sums[(t * chunks + c) * SIDE + m] = there ? sum_of<X>(from, bytes / SIZE, p) : 0.0f;
        }
    }
}

// Some columns of a group: operands of one or two times 16 outputs, `apart` bytes from each other, and their ranges.
struct Panel {
    const uint8_t* w;
    int64_t apart, steps;
    F s[2], d[2];
};

// The same columns of tokens: tiles and sums, and how far the next 16 tokens' are; how many tokens a tile has.
struct Rows {
    const uint8_t* x;
    const float* sums;
    int64_t apart, next;
    int high;
};

// 16 A tokens by 16 R outputs: joins C, `[16 A, 32]`. Where weights are multiplied by their scales already, C is what
// the tiles begin with.
template <class W, int A, int R>
ALWAYS void square(const Product& p, const Rows& rows, const Panel& panel, float* C, uint8_t* scratch) {
    constexpr int64_t WIDE_C = 2 * LANES, STRIDE = WIDE_C * sizeof(float);
    each<A * R>([&](auto i) HERE {
        constexpr int a = i / R, r = i % R;
        if constexpr (W::SCALED)
            tile_load<a * 2 + r>(C + a * SIDE * WIDE_C + r * LANES, STRIDE);
        else
            tile_zero<a * 2 + r>();
    });
    dots<W::INTEGERS, A, R>(rows.x, rows.apart, panel.w, panel.apart, panel.steps);
    each<A * R>([&](auto i) HERE {
        constexpr int a = i / R, r = i % R;
        float* to = C + a * SIDE * WIDE_C + r * LANES;
        if constexpr (W::SCALED) return tile_store<a * 2 + r>(to, STRIDE);
        tile_store<a * 2 + r>(scratch, 64);
        for (int m = 0; m < rows.high; ++m, to += WIDE_C) {
            auto acc = (typename W::Acc)held<V>(scratch + 64 * m);
            const float sum = rows.sums[a * rows.next + m];
            if constexpr (W::INTEGERS) acc = add(acc, all((int)(-p.middle * (int)sum)));
            F number = W::number(acc);
            if (p.d) number = fma(panel.d[r], all(sum), number);
            store(to, fma(panel.s[r], number, load(to)));
        }
    });
}

// Columns k .. k + columns of the g-th group, R times 16 outputs from n on. Codes that are operands stay where they
// are.
template <class W, class X>
Panel panel_of(const Product& p, int64_t n, int R, int64_t k, int64_t columns, int64_t g, int64_t room, uint8_t* to) {
    constexpr int INPUTS = 16 * X::EACH;
    const int64_t row = p.K / W::INPUTS * W::BYTES, rest = columns % INPUTS;
    Panel panel{to, room, (columns + INPUTS - 1) / INPUTS, {}, {}};
    const bool direct = !W::DECODES && !rest;
    if (direct) panel.w = p.w + place<W>(n, row) + k / W::INPUTS * W::BYTES, panel.apart = row;
    for (int r = 0; r < R; ++r, n += LANES, to += room) {
        panel.s[r] = W::SCALED || !p.s ? all(1.0f) : ranges(p.s, p.at(g, n), p.narrow_s);
        panel.d[r] = p.d ? ranges(p.d, p.at(g, n), p.narrow_d) : all(0.0f);
        if (direct) continue;
        put_down<W, X>(p, n, k, columns, g, to);
        if (rest) std::memset(to + columns / X::EACH * 64, 0, (INPUTS - rest) / X::EACH * 64);  // tokens are 0 there
    }
    return panel;
}

template <class W>
void in_tiles(const Product& p, const uint8_t* tokens) {
    using X = Decoded<typename W::As>;
    constexpr int INPUTS = 16 * X::EACH, WIDEST = 16 * INPUTS;  // of a tile; of a panel that fits the first-level cache
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;
    int64_t width = std::min(p.group, p.K);
    if (W::SCALED || width == p.K || width % WIDEST == 0) width = std::min<int64_t>(WIDEST, p.K);
    const int64_t count = (p.M + SIDE - 1) / SIDE, chunks = (p.K + width - 1) / width, units = p.units();
    const int64_t room = (width + INPUTS - 1) / INPUTS * TILE;  // of 16 tokens or outputs, a chunk
    const int64_t size = SIDE * 2 * LANES;                      // of 16 tokens' sums
    const int high = (int)std::min<int64_t>(SIDE, p.M);
    auto x = buffer<uint8_t>(count * chunks * room);
    auto sums = buffer<float>(count * chunks * SIDE);
    std::atomic<int64_t> tile{0}, turn{0};
    together(count > 1 ? p.threads : 1, [&] {
        for (int64_t t; (t = tile++) < count;) tokens_of_tile<X>(tokens, p, width, room / TILE, t, x.get(), sums.get());
    });
    together(p.threads, [&] {
        const Configured tiles(high);
        auto C = buffer<float>(count * size);
        auto held = buffer<uint8_t>(2 * room), scratch = buffer<uint8_t>(TILE);
        for (int64_t n; (n = 2 * turn++) < units;) {
            const int R = (int)std::min<int64_t>(2, units - n);
            std::memset(C.get(), 0, sizeof(float) * count * size);
            for (int64_t c = 0, g = 0; c < chunks; ++c) {
                const int64_t k = c * width;
                g += k >= (g + 1) * p.group;
                const Panel panel =
                    panel_of<W, X>(p, n * LANES, R, k, std::min(width, p.K - k), g, room, held.get());
                for (int64_t t = 0; t < count; t += 2) {
                    const int64_t at = t * chunks + c;
                    const Rows rows{x.get() + at * room, sums.get() + at * SIDE, chunks * room, chunks * SIDE, high};
                    auto some = [&](auto a, auto r) HERE {
                        square<W, a, r>(p, rows, panel, C.get() + t * size, scratch.get());
                    };
                    if (R == 2)
                        t + 1 < count ? some(two, two) : some(one, two);
                    else
                        t + 1 < count ? some(two, one) : some(one, one);
                }
            }
            for (int64_t t = 0; t < count; ++t) write<SIDE, 2>(p, n * LANES, t, C.get() + t * size);
        }
    });
}

}  // namespace
#endif
