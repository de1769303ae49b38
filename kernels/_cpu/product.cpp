// y = x W^T with W of 4 or 8 bits, decoded in registers or, for many tokens, once into the first-level cache.
//
// W lies in blocks of 16 outputs x 8 inputs (layout.py). bfloat16 tokens are multiplied with bfloat16 values of a table
// (vdpbf16ps), int8 tokens with the codes themselves (vpdpbusd); both add in 32 bits until a group of columns ends:
//
//     y[m, n] = sx[m] (sum_g s[g, n] (sum_k x[m, k] (c[n, k] - middle) + d[g, n] sum_k x[m, k])) - zx[m] rows[n] sx[m]
//
// Needs AVX-512 with VNNI and BF16. OpenMP's functions are those of the process that loads it.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

namespace {

using V = __m512i;
#define ALWAYS inline __attribute__((always_inline))
#define HERE __attribute__((always_inline))

constexpr int LANES = 16, STEP = 8;  // outputs and inputs of a block
constexpr int64_t MOST = 512;        // tokens at a time: their sums stay in the second-level cache

// f(0), f(1) ... with constants: an array that is only read at constants stays in registers, also before loops unroll.
template <class F, int... I>
ALWAYS void each(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class F>
ALWAYS void each(F f) {
    each(f, std::make_integer_sequence<int, COUNT>{});
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;
template <class T>
Buffer<T> buffer(size_t count) {
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
}

ALWAYS __m512 widened(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

// Scales and shifts of 16 outputs, bfloat16 or float32.
ALWAYS __m512 ranges(const void* at, int64_t index, bool narrow) {
    if (narrow) return widened(_mm256_loadu_si256((const __m256i*)((const uint16_t*)at + index)));
    return _mm512_loadu_ps((const float*)at + index);
}

// How codes become operands. The two instructions by name: gcc 12 copies the accumulators of its intrinsics around. `Raw` is a block as loaded; `part<S>` the operand of its S-th inputs.
struct Bf16 {
    using Acc = __m512;
    static constexpr int STEPS = 4, EACH = 2, PARTS = 4;  // operands of tokens, inputs of one, operands of codes
    static ALWAYS Acc zero() { return _mm512_setzero_ps(); }
    static ALWAYS void dot(Acc& acc, V w, V x) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x)); }
    static ALWAYS Acc add(Acc a, Acc b) { return _mm512_add_ps(a, b); }
    static ALWAYS __m512 number(Acc acc) { return acc; }
};

struct Int8 {
    using Acc = __m512i;
    static constexpr int STEPS = 2, EACH = 4, PARTS = 2;
    static ALWAYS Acc zero() { return _mm512_setzero_si512(); }
    static ALWAYS void dot(Acc& acc, V w, V x) { asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x)); }
    static ALWAYS Acc add(Acc a, Acc b) { return _mm512_add_epi32(a, b); }
    static ALWAYS __m512 number(Acc acc) { return _mm512_cvtepi32_ps(acc); }
};

struct Bf16Of4 : Bf16 {  // words of four codes, the table looked up by their low bits
    static constexpr int BYTES = 64;
    struct Raw {
        V v;
    };
    V table;
    explicit Bf16Of4(const void* values) : table(_mm512_loadu_si512(values)) {}
    ALWAYS Raw load(const uint8_t* w) const { return {_mm512_loadu_si512(w)}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_permutexvar_epi16(S ? _mm512_srli_epi16(raw.v, 4 * S) : raw.v, table);
    }
};

struct At {  // a block that stays where it is until an operand of it is needed
    const uint8_t* at;
};

struct Bf16OfBytes : Bf16 {  // signed bytes, 32 an operand
    static constexpr int BYTES = 128;
    using Raw = At;
    explicit Bf16OfBytes(const void*) {}
    ALWAYS Raw load(const uint8_t* w) const { return {w}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        __m512 half[2];
        for (int i = 0; i < 2; ++i)
            half[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(raw.at + 32 * S + 16 * i))));
        return (V)_mm512_cvtne2ps_pbh(half[1], half[0]);
    }
};

struct Bf16Of8 : Bf16 {  // 256 values in four lookups of 64
    static constexpr int BYTES = 128;
    using Raw = At;
    V table[8];
    explicit Bf16Of8(const void* values) {
        for (int i = 0; i < 8; ++i) table[i] = _mm512_loadu_si512((const uint8_t*)values + 64 * i);
    }
    ALWAYS Raw load(const uint8_t* w) const { return {w}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        V code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(raw.at + 32 * S))), half[2];
        __mmask32 odd = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
        for (int i = 0; i < 2; ++i)
            half[i] = _mm512_mask_blend_epi16(odd, _mm512_permutex2var_epi16(table[4 * i], code, table[4 * i + 1]),
                                              _mm512_permutex2var_epi16(table[4 * i + 2], code, table[4 * i + 3]));
        return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(128)), half[0], half[1]);
    }
};

struct Int8Of4 : Int8 {
    static constexpr int BYTES = 64;
    struct Raw {
        V v;
    };
    explicit Int8Of4(const void*) {}
    ALWAYS Raw load(const uint8_t* w) const { return {_mm512_loadu_si512(w)}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_and_si512(S ? _mm512_srli_epi16(raw.v, 4) : raw.v, _mm512_set1_epi8(15));
    }
};

struct Int8Of8 : Int8 {
    static constexpr int BYTES = 128;
    using Raw = At;
    explicit Int8Of8(const void*) {}
    ALWAYS Raw load(const uint8_t* w) const { return {w}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_loadu_si512(raw.at + 64 * S);
    }
};

template <class Of>
struct Decoded : Of {  // operands as they are
    static constexpr int BYTES = 64 * Of::STEPS;
    using Raw = At;
    ALWAYS Raw load(const uint8_t* w) const { return {w}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_load_si512(raw.at + 64 * S);
    }
};

// Values that are no bfloat16: the nearest one and what it leaves, multiplied one after the other. Written down, they
// are multiplied by their scales first and rounded once.
struct Bf16Split4 : Bf16 {
    static constexpr int BYTES = 64, PARTS = 8;
    using Raw = Bf16Of4::Raw;
    V high, low;
    __m512 whole;
    explicit Bf16Split4(const void* values)
        : high(_mm512_loadu_si512(values)),
          low(_mm512_loadu_si512((const uint8_t*)values + 64)),
          whole(_mm512_loadu_ps((const float*)values + 32)) {}
    ALWAYS Raw load(const uint8_t* w) const { return {_mm512_loadu_si512(w)}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(raw.v, 4 * (S % 4)), S < 4 ? high : low);
    }
    template <int S>
    ALWAYS V scaled(const Raw& raw, __m512 s) const {
        const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(raw.v, 4 * S), whole),
                     odd = _mm512_permutexvar_ps(_mm512_srli_epi32(raw.v, 16 + 4 * S), whole);
        const V both = (V)_mm512_cvtne2ps_pbh(_mm512_mul_ps(odd, s), _mm512_mul_ps(even, s));
        const V first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)),
                second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
        return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
    }
};

struct Product {
    const uint8_t* w;      // [N / 16, K / 8] blocks
    const void* table;     // values of the codes, for bfloat16 tokens
    const void *s, *d;     // [G, N]: scales, and shifts or null
    const float* rows;     // [N]: what tokens with zero points take off, or null
    const float *sx, *zx;  // [M], or null
    void* y;               // [M, N]
    int64_t M, N, K, group;
    int narrow_s, narrow_d, narrow_y, middle, threads;
};

// Tokens in tiles: uint32 [tiles, K / EACH, MB], and their sums over every chunk of columns [tiles, chunks, MB].
struct Tiles {
    const uint32_t* x;
    const float* sums;
    int64_t count;
};

template <class W, int S, int MB, int R>
ALWAYS void step(const W& of, const typename W::Raw (&raw)[R], const uint32_t* x, typename W::Acc (&acc)[MB][R]) {
    if constexpr (S < W::PARTS) {
        V w[R];
        each<R>([&](auto r) HERE { w[r] = of.template part<S>(raw[r]); });
        each<MB>([&](auto m) HERE {
            const V token = _mm512_set1_epi32((int)x[S % W::STEPS * MB + m]);
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
        const typename W::Raw raw = of.load(w);
        each<P>([&](auto i) HERE {
            const V v = of.template part<i>(raw);
            each<MB>([&](auto m) HERE { W::dot(acc[m][which * P + i], v, _mm512_set1_epi32((int)x[i % W::STEPS * MB + m])); });
        });
    };
    int64_t b = 0;
    for (; b + 1 < blocks; b += 2, w += 2 * W::BYTES, x += 2 * W::STEPS * MB) {
        for (int i = 0; i < 2 * W::BYTES; i += 64) _mm_prefetch((const char*)w + 2048 + i, _MM_HINT_T0);
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

// MB tokens, 16 R outputs, some columns of one group: joins C. FAR: W comes from memory.
template <class W, int MB, int R, bool FAR>
ALWAYS void chunk(const W& of, const uint8_t* w, size_t next, const uint32_t* x, int64_t blocks, const float* sums,
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
    for (int64_t b = 0; b < blocks; ++b, w += W::BYTES, x += W::STEPS * MB) {
        typename W::Raw raw[R];
        each<R>([&](auto r) HERE {
            if constexpr (FAR)
                for (int i = 0; i < W::BYTES; i += 64) _mm_prefetch((const char*)w + r * next + 1024 + i, _MM_HINT_T0);
            raw[r] = of.load(w + r * next);
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
        int64_t token = tile * MB + m;
        for (int r = 0; r < R; ++r) {
            int64_t n = (first + r) * LANES;
            if (n >= p.N) break;
            __mmask16 mask = (__mmask16)((1u << std::min<int64_t>(LANES, p.N - n)) - 1);
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

// All tokens for 16 R outputs. ONCE: what a chunk's codes are is written down first, and serves every tile.
template <class W, int MB, int R, bool ONCE>
void strip(const Product& p, const Tiles& tiles, int64_t width, int64_t first, float* C, uint8_t* held) {
    const W of(p.table);
    constexpr bool SCALED = W::PARTS > W::STEPS;
    using Once = Decoded<std::conditional_t<W::EACH == 2, Bf16, Int8>>;
    const size_t next = (size_t)(p.K / STEP) * W::BYTES;
    const uint8_t* w = p.w + first * next;
    const int64_t chunks = (p.K + width - 1) / width;  // width divides the group, or all is one group
    const bool shifted = p.d != nullptr;
    const int64_t stride = (p.N + LANES - 1) / LANES * LANES;
    std::memset(C, 0, sizeof(float) * tiles.count * MB * R * LANES);
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t k = c * width, blocks = std::min(width, p.K - k) / STEP, g = k / p.group;
        __m512 s[R], d[R];
        for (int r = 0; r < R; ++r) {
            s[r] = ranges(p.s, g * stride + (first + r) * LANES, p.narrow_s);
            d[r] = shifted ? ranges(p.d, g * stride + (first + r) * LANES, p.narrow_d) : _mm512_setzero_ps();
        }
        const uint8_t* from = w + k / STEP * W::BYTES;
        if constexpr (ONCE) {
            for (int r = 0; r < R; ++r)
                for (int64_t b = 0; b < blocks; ++b) {
                    typename W::Raw raw = of.load(from + r * next + b * W::BYTES);
                    uint8_t* to = held + (r * blocks + b) * Once::BYTES;
                    each<W::STEPS>([&](auto i) HERE {
                        if constexpr (SCALED)
                            _mm512_store_si512(to + 64 * i, of.template scaled<i>(raw, s[r]));
                        else
                            _mm512_store_si512(to + 64 * i, of.template part<i>(raw));
                    });
                }
            if constexpr (SCALED)
                for (int r = 0; r < R; ++r) s[r] = _mm512_set1_ps(1);
        }
        for (int64_t t = 0; t < tiles.count; ++t) {
            const uint32_t* x = tiles.x + (t * p.K + k) / W::EACH * MB;
            const float* sums = tiles.sums + (t * chunks + c) * MB;
            float* at = C + t * MB * R * LANES;
            if constexpr (ONCE)
                chunk<Once, MB, R, false>(Once(), held, blocks * Once::BYTES, x, blocks, sums, p.middle, s, d, shifted, at);
            else if constexpr (R == 1 && MB <= 2)
                line<W, MB>(of, from, x, blocks, sums, p.middle, s[0], d[0], shifted, at);
            else
                chunk<W, MB, R, true>(of, from, next, x, blocks, sums, p.middle, s, d, shifted, at);
        }
    }
    for (int64_t t = 0; t < tiles.count; ++t) write<MB, R>(p, first, t, C + t * MB * R * LANES);
}

template <class W, int MB>
void tile_tokens(const uint8_t* tokens, const Product& p, int64_t true_K, int64_t width, int64_t t, uint32_t* x,
                 float* sums) {
    constexpr int SIZE = 4 / W::EACH;
    const int64_t words = p.K / W::EACH, whole = true_K / W::EACH, chunks = (p.K + width - 1) / width;
    x += t * words * MB, sums += t * chunks * MB;
    for (int m = 0; m < MB; ++m) {
        const int64_t token = t * MB + m;
        const uint8_t* from = tokens + token * true_K * SIZE;
        const int64_t have = token < p.M ? whole : 0;
        for (int64_t i = 0; i < have; ++i) std::memcpy(x + i * MB + m, from + i * 4, 4);
        for (int64_t i = have; i < words; ++i) x[i * MB + m] = 0;
        if (token < p.M && whole * W::EACH < true_K)
            std::memcpy(x + whole * MB + m, from + whole * 4, (true_K - whole * W::EACH) * SIZE);
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t k = c * width, end = token < p.M ? std::min(k + width, true_K) : k;
            float sum = 0;
            if constexpr (W::EACH == 4) {
                int whole_sum = 0;
                for (int64_t i = k; i < end; ++i) whole_sum += ((const int8_t*)from)[i];
                sum = (float)whole_sum;
            } else if (p.d) {
                __m512 total = _mm512_setzero_ps();
                const uint16_t* at = (const uint16_t*)from;
                for (int64_t i = k; i < end; i += 16) {
                    __mmask16 mask = (__mmask16)((1u << std::min<int64_t>(16, end - i)) - 1);
                    total = _mm512_add_ps(total, widened(_mm256_maskz_loadu_epi16(mask, at + i)));
                }
                sum = _mm512_reduce_add_ps(total);
            }
            sums[c * MB + m] = sum;
        }
    }
}

template <class W, int MB, int R, bool ONCE>
void multiply(const Product& p, const uint8_t* tokens, int64_t true_K) {
    int64_t width = p.group;
    if (ONCE && width > 256) width = p.group >= p.K || p.group % 256 == 0 ? 256 : p.group;
    const int64_t count = (p.M + MB - 1) / MB, chunks = (p.K + width - 1) / width;
    const int64_t blocks = (p.N + LANES - 1) / LANES, strips = (blocks + R - 1) / R;
    auto x = buffer<uint32_t>(count * p.K / W::EACH * MB);
    auto sums = buffer<float>(count * chunks * MB);
    const Tiles tiles{x.get(), sums.get(), count};
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
    {
#pragma omp for
        for (int64_t t = 0; t < count; ++t) tile_tokens<W, MB>(tokens, p, true_K, width, t, x.get(), sums.get());
        auto C = buffer<float>(count * MB * R * LANES);
        auto held = buffer<uint8_t>(ONCE ? R * width / STEP * 64 * W::STEPS : 64);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < strips; ++i) {
            if (blocks - i * R >= R)
                strip<W, MB, R, ONCE>(p, tiles, width, i * R, C.get(), held.get());
            else
                for (int64_t r = i * R; r < blocks; ++r)
                    strip<W, MB, 1, ONCE>(p, tiles, width, r, C.get(), held.get());
        }
    }
}

template <class W, bool DECODES>
void by_tokens(const Product& p, const uint8_t* tokens, int64_t true_K) {
    if (p.M == 1) return multiply<W, 1, 1, false>(p, tokens, true_K);
    if (p.M == 2) return multiply<W, 2, 1, false>(p, tokens, true_K);
    if (p.M <= 4) return multiply<W, 4, 4, false>(p, tokens, true_K);
    if (p.M <= 8) return multiply<W, 8, 2, false>(p, tokens, true_K);
    multiply<W, 8, 3, DECODES>(p, tokens, true_K);
}

}  // namespace

extern "C" {

// tokens: [M, true_K] bfloat16 or int8; K is true_K up to a multiple of 8. kind: as native.KINDS has them.
void hf_quant_product(const Product* whole, const void* tokens, int64_t true_K, int kind) {
    Product p = *whole;
    for (int64_t m = 0; m < whole->M; m += MOST) {
        p.M = std::min(MOST, whole->M - m);
        p.y = (uint8_t*)whole->y + m * p.N * (p.narrow_y ? 2 : 4);
        p.sx = whole->sx ? whole->sx + m : nullptr;
        p.zx = whole->zx ? whole->zx + m : nullptr;
        const uint8_t* x = (const uint8_t*)tokens + m * true_K * (kind < 4 ? 2 : 1);
        switch (kind) {
            case 0: by_tokens<Bf16Of4, true>(p, x, true_K); break;
            case 1: by_tokens<Bf16Split4, true>(p, x, true_K); break;
            case 2: by_tokens<Bf16Of8, true>(p, x, true_K); break;
            case 3: by_tokens<Bf16OfBytes, true>(p, x, true_K); break;
            case 4: by_tokens<Int8Of4, true>(p, x, true_K); break;
            case 5: by_tokens<Int8Of8, false>(p, x, true_K); break;
        }
    }
}

// Tokens [M, K] onto the grid low .. high: code = clamp(round(x / scale + zero)) - shift, scale and zero of each token.
void hf_quant_tokens(const void* x, int narrow, int64_t M, int64_t K, int low, int high, int shift, int asymmetric,
                     int8_t* codes, float* scale, float* zero, int threads) {
    auto load = [=](int64_t i, __mmask16 mask) {
        if (narrow) return widened(_mm256_maskz_loadu_epi16(mask, (const uint16_t*)x + i));
        return _mm512_maskz_loadu_ps(mask, (const float*)x + i);
    };
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < M; ++m) {
        __m512 least = _mm512_setzero_ps(), most = _mm512_setzero_ps();
        __mmask16 unordered = 0;
        for (int64_t k = 0; k < K; k += 16) {
            __m512 v = load(m * K + k, (__mmask16)((1u << std::min<int64_t>(16, K - k)) - 1));
            least = _mm512_min_ps(least, v), most = _mm512_max_ps(most, v);
            unordered |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        }
        const float l = _mm512_reduce_min_ps(least), h = _mm512_reduce_max_ps(most);
        float step = asymmetric ? (h - l) / (float)(high - low) : low == 0 ? h / high : std::max(l / low, h / high);
        step = step > 0 ? step : 1.0f;
        const float z = asymmetric ? std::nearbyint(std::min(std::max(low - l / step, (float)low), (float)high)) : 0;
        scale[m] = unordered ? NAN : step;
        if (asymmetric) zero[m] = z - shift;
        const __m512 by = _mm512_set1_ps(step), zeros = _mm512_set1_ps(z), lows = _mm512_set1_ps((float)low),
                     highs = _mm512_set1_ps((float)high);
        const __m512i off = _mm512_set1_epi32(shift);
        for (int64_t k = 0; k < K; k += 16) {
            __mmask16 mask = (__mmask16)((1u << std::min<int64_t>(16, K - k)) - 1);
            __m512 v = _mm512_add_ps(_mm512_div_ps(load(m * K + k, mask), by), zeros);
            v = _mm512_min_ps(_mm512_max_ps(v, lows), highs);
            __m512i code = _mm512_sub_epi32(_mm512_cvtps_epi32(v), off);
            _mm_mask_storeu_epi8(codes + m * K + k, mask, _mm512_cvtepi32_epi8(code));
        }
    }
}
}
