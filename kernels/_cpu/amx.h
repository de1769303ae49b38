// Processors with AMX. Sixteen tokens by sixteen outputs at once: a tile is 16 rows of 64 bytes, of tokens 32 or 64
// inputs, of weights an operand of 16 outputs a row, of sums a token's 16.
#pragma once
#include "vectors.h"

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

bool have_tiles() { return false; }
int64_t at_once(const Product&) { return MOST; }

}  // namespace
#endif
