// y = x W^T with W of 4 or 8 bits, decoded in registers or, for many tokens, once into the first-level cache (with AMX:
// in_tiles.h).
//
// W lies in blocks of 16 outputs x 8 inputs (layout.py). bfloat16 tokens are multiplied with bfloat16 values of a table
// (vdpbf16ps), int8 tokens with the codes themselves (vpdpbusd); both add in 32 bits until a group of columns ends:
//
//     y[m, n] = sx[m] (tensor sum_g s[g, n] (sum_k x[m, k] (c[n, k] - middle) + d[g, n] sum_k x[m, k]) - zx[m] rows[n])
//
// OpenMP's functions are those of the process that loads it.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "dense.h"
#include "in_tiles.h"
#include "outputs.h"
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
            if constexpr (W::OUTPUTS == LANES) ahead<W::BYTES>(w);
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

// Calls with the operands of a kind.
template <class Call>
ALWAYS void of_kind(int64_t kind, const void* table, Call call) {
    switch (kind) {
        case 0: call((Of4*)nullptr); break;
        case 1: call((Scaled4*)nullptr); break;
        case 2: call((Floats4*)nullptr); break;
        case 3: call((OfRows*)nullptr); break;
        case 4: of_bytes(table, call); break;
        case 5: call((OfBytes*)nullptr); break;
        case 6: call((Nibbles*)nullptr); break;
        case 7: call((Bytes*)nullptr); break;
    }
}

}  // namespace

extern "C" int64_t hf_quant_tiles() { return have_tiles(); }

// Tokens up to which codes are decoded in registers.
extern "C" int64_t hf_quant_few(int64_t kind) {
    int64_t few = WIDE ? 8 : 2;
#ifdef __AMX_TILE__
    if (have_tiles()) of_kind(kind, nullptr, [&](auto* of) HERE { few = std::decay_t<decltype(*of)>::FEW; });
#else
    (void)kind;
#endif
    return few;
}

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
        of_kind(p.kind, p.table, [&](auto* of) HERE { by_tokens<std::decay_t<decltype(*of)>>(p, x); });
        p.y = (uint8_t*)p.y + p.M * p.N * (p.narrow_y ? 2 : 4);
        p.sx = p.sx ? p.sx + p.M : nullptr;
        p.zx = p.zx ? p.zx + p.M : nullptr;
    }
}
