#pragma once
#include "vectors.h"

namespace {

// bfloat16 tokens are multiplied two inputs at a time, integers four. The two instructions by name: gcc 12 copies the
// accumulators of its intrinsics around.
struct Bf16 : Floats {
    using As = Bf16;  // when written down
    using Operand = V;
    using Token = uint16_t;
    static constexpr int STEPS = 4, EACH = 2, PARTS = 4;  // operands of tokens, inputs of a word, operands of codes
    static constexpr int FEW = 4;                         // tokens that are multiplied faster without tiles
    static ALWAYS V token(const uint32_t* x) { return all((int)*x); }
    static ALWAYS void dot(Acc& acc, V w, V x) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x)); }
};

struct Int8 : Integers {
    using As = Int8;
    using Operand = V;
    using Token = int8_t;
    static constexpr int STEPS = 2, EACH = 4, PARTS = 2, FEW = 8;
    static ALWAYS V token(const uint32_t* x) { return all((int)*x); }
    static ALWAYS void dot(Acc& acc, V w, V x) { asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x)); }
};

// Tokens as they are multiplied: as they come.
ALWAYS const uint8_t* as_operands(const uint8_t* x, Product& p, Buffer<uint8_t>&) { return x; }

struct Of4 : Bf16 {  // words of four codes, the table looked up by their low bits
    static constexpr int BYTES = 64, FEW = 2;
    struct Raw {
        V v;
    };
    V table;
    explicit Of4(const void* values) : table(_mm512_loadu_si512(values)) {}
    ALWAYS Raw load(const uint8_t* w, int) const { return {_mm512_loadu_si512(w)}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_permutexvar_epi16(S ? _mm512_srli_epi16(raw.v, 4 * S) : raw.v, table);
    }
};

struct OfBytes : Bf16 {  // signed bytes, 32 an operand
    static constexpr int BYTES = 128;
    using Raw = At;
    explicit OfBytes(const void*) {}
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

struct Of8 : Bf16 {  // 256 values in four lookups of 64
    static constexpr int BYTES = 128;
    using Raw = At;
    V table[8];
    explicit Of8(const void* values) {
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

// Calls with the operands of a table of 256.
template <class Call>
ALWAYS void of_bytes(const void*, Call call) {
    call((Of8*)nullptr);
}

struct Nibbles : Int8 {
    static constexpr int BYTES = 64;
    struct Raw {
        V v;
    };
    explicit Nibbles(const void*) {}
    ALWAYS Raw load(const uint8_t* w, int) const { return {_mm512_loadu_si512(w)}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_and_si512(S ? _mm512_srli_epi16(raw.v, 4) : raw.v, _mm512_set1_epi8(15));
    }
};

struct Bytes : Int8 {
    static constexpr int BYTES = 128;
    static constexpr bool DECODES = false;  // there is nothing to decode
    using Raw = At;
    explicit Bytes(const void*) {}
    ALWAYS Raw load(const uint8_t* w, int) const { return {w}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_loadu_si512(raw.at + 64 * S);
    }
};

// Written down, values are multiplied by their scales first and rounded once.
struct Scaled4 : Of4 {
    static constexpr bool SCALED = true;
    static constexpr int FEW = 4;
    __m512 whole;
    explicit Scaled4(const void* values) : Of4(values), whole(_mm512_loadu_ps((const float*)values + 16)) {}
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
struct Floats4 : Scaled4 {
    static constexpr int PARTS = 8, FEW = 2;
    V low;
    explicit Floats4(const void* values)
        : Scaled4(values), low(_mm512_loadu_si512((const uint8_t*)values + 128)) {}
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(raw.v, 4 * (S % 4)), S < 4 ? table : low);
    }
};

// 128 inputs of 8 outputs, each with a table of its own: lanes are inputs, an accumulator is one output's.
struct OfRows : Bf16 {
    static constexpr int OUTPUTS = 1, LINE = 8, INPUTS = 128, BYTES = 512, WORDS = 16, TABLE = 32, FEW = 2;
    struct Raw {
        V v, table;
    };
    const uint8_t* tables;
    explicit OfRows(const void* values) : tables((const uint8_t*)values) {}
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

}  // namespace
