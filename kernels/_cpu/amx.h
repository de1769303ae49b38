// Sixteen tokens by sixteen outputs at once. A tile is 16 rows of 64 bytes: of tokens 32 or 64 inputs, of weights an
// operand of 16 outputs a row, of sums a token's 16.
#pragma once
#include "tokens.h"

#ifdef __AMX_TILE__
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int TILE = 1024;  // bytes
constexpr int SIDE = 16;    // tokens of a tile

// Whether Linux lets this process have them.
bool have_tiles() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
    return granted;
}

// Tokens at a time: all of them stay in the second-level cache.
int64_t at_once(const Product& p) {
    if (!have_tiles()) return MOST;
    return std::min<int64_t>(256, std::max<int64_t>(96, (1 << 20) / (p.K * p.bytes()) / SIDE * SIDE));
}

// A thread's tiles while it lives: 0 to 3 sums, 4 and 5 tokens, 6 and 7 weights.
class Configured {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, none[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16];
    } shape;

   public:
    explicit Configured(int tokens) {
        for (int i = 0; i < 16; ++i) shape.rows[i] = i < 6 ? tokens : i < 8 ? 16 : 0;
        asm volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~Configured() { asm volatile("tilerelease"); }
};

template <int T>
ALWAYS void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
ALWAYS void tile_load(const void* at, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(T) : "memory");
}
template <int T>
ALWAYS void tile_store(void* at, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(stride), "i"(T) : "memory");
}
template <bool INTEGERS, int C, int A, int B>
ALWAYS void tile_dot() {
    if constexpr (INTEGERS)
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    else
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

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

// A x R tiles of sums over some columns; `rows` and `row`: bytes from one tile of tokens, of weights to the next.
template <bool INTEGERS, int A, int R>
ALWAYS void dots(const uint8_t* x, int64_t rows, const uint8_t* w, int64_t row, int64_t steps) {
    for (int64_t s = 0; s < steps; ++s, x += TILE, w += TILE) {
        each<A>([&](auto a) HERE { tile_load<4 + a>(x + a * rows, 64); });
        each<R>([&](auto r) HERE {
            tile_load<6 + r>(w + r * row, 64);
            each<A>([&](auto a) HERE { tile_dot<INTEGERS, a * 2 + r, 4 + a, 6 + r>(); });
        });
    }
}

}  // namespace
#else
namespace {
int64_t at_once(const Product&) { return MOST; }
}  // namespace
#endif
