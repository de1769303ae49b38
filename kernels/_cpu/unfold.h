// Windows of an image as rows of a matrix: every window is the same runs of values, from where it begins.
#pragma once
#include <atomic>
#include <cstring>

#include "vectors.h"

namespace {

template <int BYTES>  // of a run; 0: any
void copy_runs(const uint8_t* from, const int64_t* runs, int64_t count, int64_t bytes, uint8_t* to) {
    const int64_t size = BYTES ? BYTES : bytes;
    for (int64_t r = 0; r < count; ++r, to += size) std::memcpy(to, from + runs[r], size);
}

}  // namespace

extern "C" {

// x: samples `stride` bytes apart; windows [P] and runs [R]: where they begin, in bytes; rows [samples, P, R * bytes].
void hf_quant_unfold(const uint8_t* x, int64_t samples, int64_t stride, const int64_t* windows, int64_t P,
                     const int64_t* runs, int64_t R, int64_t bytes, uint8_t* rows, int64_t threads) {
    constexpr int64_t SOME = 16;  // windows a turn
    const int64_t turns = (P + SOME - 1) / SOME * samples;
    auto copy = bytes == 12  ? copy_runs<12>
                : bytes == 6 ? copy_runs<6>
                : bytes == 4 ? copy_runs<4>
                : bytes == 2 ? copy_runs<2>
                             : copy_runs<0>;
    std::atomic<int64_t> turn{0};
    together(threads, [&] {
        for (int64_t t; (t = turn++) < turns;) {
            const int64_t sample = t % samples, first = t / samples * SOME;
            for (int64_t p = first; p < std::min(first + SOME, P); ++p)
                copy(x + sample * stride + windows[p], runs, R, bytes, rows + (sample * P + p) * R * bytes);
        }
    });
}
}
