// The weight itself, as gradients are multiplied by it: transposed, so that 16 outputs of an input are a store.
#pragma once
#include <atomic>

#include "vectors.h"

namespace {

// put(i, values): input i of a block, 16 outputs, by the kinds of layout.py.
template <class Put>
ALWAYS void levels4(const uint8_t* w, F table, Put put) {
    const V v = words(w);
    each<8>([&](auto i) HERE { put(i, looked_up(right<i / 2 * 4 + i % 2 * 16>(v), table)); });
}

template <class Put>
ALWAYS void integers4(const uint8_t* w, F table, Put put) {
    const V v = words(w);
    each<8>([&](auto i) HERE { put(i, looked_up(right<i % 4 * 8 + i / 4 * 4>(v), table)); });
}

template <class Put>
ALWAYS void levels8(const uint8_t* w, const float* table, Put put) {
    each<4>([&](auto j) HERE {
        const V v = halves(w + 32 * j);
        each<2>([&](auto i) HERE {
            put(std::integral_constant<int, 2 * j + i>{}, looked_up(lowest_byte(right<8 * i>(v)), table));
        });
    });
}

template <class Put>
ALWAYS void bytes8(const uint8_t* w, Put put) {
    each<4>([&](auto j) HERE {
        const V v = halves(w + 32 * j);
        each<2>([&](auto i) HERE {
            put(std::integral_constant<int, 2 * j + i>{}, number(signed_byte<i>(v)));
        });
    });
}

template <class Put>
ALWAYS void integers8(const uint8_t* w, F less_middle, Put put) {
    each<2>([&](auto j) HERE {
        const V v = words(w + 64 * j);
        each<4>([&](auto i) HERE {
            put(std::integral_constant<int, 4 * j + i>{}, add(number(lowest_byte(right<8 * i>(v))), less_middle));
        });
    });
}

// Inputs first .. last of all outputs: y[k - first, n] = (v(c[n, k]) + d[g, n]) s[g, n] tensor.
template <class Block>
void dense(const Product& p, int64_t first, int64_t last, int64_t bytes, Block block) {
    std::atomic<int64_t> turn{0};
    together(p.threads, [&] {
        for (int64_t some; (some = 8 * turn++) < p.units();)  // whole lines are written before they leave the cache
            for (int64_t k = first; k < last; k += 8)
                for (int64_t unit = some; unit < std::min(some + 8, p.units()); ++unit) {
                    const int64_t n = unit * LANES, at = p.at(k / p.group, n);
                    const F s = p.s ? ranges(p.s, at, p.narrow_s) : all(1.0f);
                    const F d = p.d ? ranges(p.d, at, p.narrow_d) : all(0.0f);
                    const Mask there = upto(p.N - n);
                    block(p.w + (unit * (p.K / 8) + k / 8) * bytes, [&](auto i, F v) HERE {
                        if (k + i >= last) return;
                        v = mul(add(v, d), s);
                        if (p.tensor) v = mul(v, all(*p.tensor));
                        const int64_t to = (k + i - first) * p.N + n;
                        if (p.narrow_y)
                            store((uint16_t*)p.y + to, there, v);
                        else
                            store((float*)p.y + to, there, v);
                    });
                }
    });
}

}  // namespace

// Of the kinds that it knows; `first` begins a block.
extern "C" void hf_quant_dense(const Product* whole, int64_t first, int64_t last) {
    const Product& p = *whole;
    alignas(64) float codes[LANES];
    for (int i = 0; i < LANES; ++i) codes[i] = (float)(i - p.middle);
    const F table = p.kind < 3 ? anywhere((const float*)p.table + LANES) : load(codes);
    const F less_middle = all((float)-p.middle);
    alignas(64) float whole_table[256];
    for (int i = 0; p.kind == 4 && i < 256; i += LANES) store(whole_table + i, widened((const uint16_t*)p.table + i));
    auto with = [&](int64_t bytes, auto block) HERE { dense(p, first, last, bytes, block); };
    switch (p.kind) {
        case 0:
        case 1:
        case 2: return with(64, [&](const uint8_t* w, auto put) HERE { levels4(w, table, put); });
        case 4: return with(128, [&](const uint8_t* w, auto put) HERE { levels8(w, whole_table, put); });
        case 5: return with(128, [&](const uint8_t* w, auto put) HERE { bytes8(w, put); });
        case 6: return with(64, [&](const uint8_t* w, auto put) HERE { integers4(w, table, put); });
        case 7: return with(128, [&](const uint8_t* w, auto put) HERE { integers8(w, less_middle, put); });
    }
}
