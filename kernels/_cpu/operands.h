#pragma once
#include "vectors.h"

namespace {

// How codes become operands. `Raw` is a block as loaded (of the r-th accumulator), `part<S>` the operand of its S-th
// inputs.

// Lanes are outputs: all of them are multiplied by the same inputs.
struct Outputs {
    static constexpr int OUTPUTS = LANES, LINE = LANES, INPUTS = 8;  // of an accumulator, of a block
    static constexpr int WORDS = 1, TABLE = 0;                       // of a token's operand; bytes of an own table
    static constexpr bool SCALED = false;                            // multiplied by scales when written down
    static ALWAYS V token(const uint32_t* x) { return _mm512_set1_epi32((int)*x); }
};

// The two instructions by name: gcc 12 copies the accumulators of its intrinsics around.
struct Bf16 : Outputs {
    using Acc = __m512;
    static constexpr int STEPS = 4, EACH = 2, PARTS = 4;  // operands of tokens, inputs of a word, operands of codes
    static ALWAYS Acc zero() { return _mm512_setzero_ps(); }
    static ALWAYS void dot(Acc& acc, V w, V x) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x)); }
    static ALWAYS Acc add(Acc a, Acc b) { return _mm512_add_ps(a, b); }
    static ALWAYS __m512 number(Acc acc) { return acc; }
};

struct Int8 : Outputs {
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
    ALWAYS Raw load(const uint8_t* w, int) const { return {_mm512_loadu_si512(w)}; }
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
    ALWAYS Raw load(const uint8_t* w, int) const { return {w}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        __m512 half[2];
        for (int i = 0; i < 2; ++i)
            half[i] = _mm512_cvtepi32_ps(
                _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(raw.at + 32 * S + 16 * i))));
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
    ALWAYS Raw load(const uint8_t* w, int) const { return {w}; }
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
    ALWAYS Raw load(const uint8_t* w, int) const { return {_mm512_loadu_si512(w)}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_and_si512(S ? _mm512_srli_epi16(raw.v, 4) : raw.v, _mm512_set1_epi8(15));
    }
};

struct Int8Of8 : Int8 {
    static constexpr int BYTES = 128;
    using Raw = At;
    explicit Int8Of8(const void*) {}
    ALWAYS Raw load(const uint8_t* w, int) const { return {w}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_loadu_si512(raw.at + 64 * S);
    }
};

template <class Of>
struct Decoded : Of {  // operands as they are, 16 outputs
    static constexpr int BYTES = 64 * Of::STEPS;
    using Raw = At;
    explicit Decoded(const void*) {}
    ALWAYS Raw load(const uint8_t* w, int) const { return {w}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_load_si512(raw.at + 64 * S);
    }
};

// Written down, values are multiplied by their scales first and rounded once.
struct Bf16Scaled4 : Bf16Of4 {
    static constexpr bool SCALED = true;
    __m512 whole;
    explicit Bf16Scaled4(const void* values) : Bf16Of4(values), whole(_mm512_loadu_ps((const float*)values + 16)) {}
    template <int S>
    ALWAYS V scaled(const Raw& raw, __m512 s) const {
        const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(raw.v, 4 * S), whole),
                     odd = _mm512_permutexvar_ps(_mm512_srli_epi32(raw.v, 16 + 4 * S), whole);
        const V both = (V)_mm512_cvtne2ps_pbh(_mm512_mul_ps(odd, s), _mm512_mul_ps(even, s));  // one after the other
        alignas(64) static constexpr uint16_t PAIRS[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return _mm512_permutexvar_epi16(_mm512_load_si512(PAIRS), both);
    }
};

// Values that are no bfloat16: the nearest one and what it leaves, multiplied one after the other.
struct Bf16Split4 : Bf16Scaled4 {
    static constexpr int PARTS = 8;
    V low;
    explicit Bf16Split4(const void* values)
        : Bf16Scaled4(values), low(_mm512_loadu_si512((const uint8_t*)values + 128)) {}
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(raw.v, 4 * (S % 4)), S < 4 ? table : low);
    }
};

ALWAYS void transpose(V (&v)[16]) {  // words of 16 rows
    V t[16];
    each<8>([&](auto i) HERE {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    });
    each<8>([&](auto i) HERE {
        constexpr int from = i / 2 * 4 + i % 2, to = i / 2 * 4 + i % 2 * 2;
        v[to] = _mm512_unpacklo_epi64(t[from], t[from + 2]), v[to + 1] = _mm512_unpackhi_epi64(t[from], t[from + 2]);
    });  // v[4 q + j]: word j of every four, of rows 4 q .. 4 q + 3
    each<4>([&](auto j) HERE {
        const V a = v[j], b = v[4 + j], c = v[8 + j], d = v[12 + j];
        const V low[] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd)},
                high[] = {_mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd)};
        each<2>([&](auto i) HERE {
            t[4 * i + j] = _mm512_shuffle_i32x4(low[i], high[i], 0x88);
            t[8 + 4 * i + j] = _mm512_shuffle_i32x4(low[i], high[i], 0xdd);
        });
    });
    each<16>([&](auto i) HERE { v[i] = t[i]; });
}

ALWAYS __m512 sums(const __m512 (&v)[16]) {  // lane i: of all lanes of v[i]
    auto four = [&](auto i) HERE {
        const __m512 a = v[i], b = v[i + 1], c = v[i + 2], d = v[i + 3],
                     low = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)),
                     high = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        return _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)low, (__m512d)high),
                             (__m512)_mm512_unpackhi_pd((__m512d)low, (__m512d)high));
    };
    auto both = [](__m512 a, __m512 b) HERE {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    using std::integral_constant;
    return both(both(four(integral_constant<int, 0>{}), four(integral_constant<int, 4>{})),
                both(four(integral_constant<int, 8>{}), four(integral_constant<int, 12>{})));
}

// 128 inputs of 8 outputs, each with a table of its own: lanes are inputs, an accumulator is one output's.
struct Bf16OfRows : Bf16 {
    static constexpr int OUTPUTS = 1, LINE = 8, INPUTS = 128, BYTES = 512, WORDS = 16, TABLE = 32;
    struct Raw {
        V v, table;
    };
    const uint8_t* tables;
    explicit Bf16OfRows(const void* values) : tables((const uint8_t*)values) {}
    static ALWAYS V token(const uint32_t* x) { return _mm512_load_si512(x); }
    ALWAYS Raw load(const uint8_t* w, int r) const {
        const __m256i table = _mm256_loadu_si256((const __m256i*)(tables + r * TABLE));
        return {_mm512_loadu_si512(w), _mm512_broadcast_i64x4(table)};  // twice, a lookup reads five bits
    }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_permutexvar_epi16(S ? _mm512_srli_epi16(raw.v, 4 * S) : raw.v, raw.table);
    }
};

// Where the n-th output begins; `row`: bytes of a row of blocks.
template <class W>
ALWAYS int64_t place(int64_t n, int64_t row) {
    return n / W::LINE * row + n % W::LINE * (W::BYTES / W::LINE);
}

// Writes down the operands of a block of 16 outputs.
template <class W>
ALWAYS void hold(const W& of, const uint8_t* w, int64_t, __m512 s, uint8_t* to) {
    const typename W::Raw raw = of.load(w, 0);
    each<W::STEPS>([&](auto i) HERE {
        if constexpr (W::SCALED)
            _mm512_store_si512(to + 64 * i, of.template scaled<i>(raw, s));
        else
            _mm512_store_si512(to + 64 * i, of.template part<i>(raw));
    });
}

ALWAYS void hold(const Bf16OfRows& of, const uint8_t* w, int64_t row, __m512, uint8_t* to) {
    each<4>([&](auto s) HERE {
        V rows[16];
        each<16>([&](auto i) HERE { rows[i] = of.template part<s>(of.load(w + place<Bf16OfRows>(i, row), i)); });
        transpose(rows);
        each<16>([&](auto i) HERE { _mm512_store_si512(to + 64 * (16 * s + i), rows[i]); });
    });
}

}  // namespace
