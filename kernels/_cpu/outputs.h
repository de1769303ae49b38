// Sums of tiles of tokens become results.
#pragma once
#include "vectors.h"

namespace {

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

}  // namespace
