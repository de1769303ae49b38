// Without products of bfloat16 or of bytes: floats times floats, one input at a time, and int16 times int16, two.
#pragma once
#include <atomic>
#include <cmath>

namespace {

struct Float : Floats {
    using As = Float;  // when written down
    using Operand = F;
    using Token = float;
    static constexpr int STEPS = 8, EACH = 1, PARTS = 8;  // operands of tokens, inputs of a word, operands of codes
    static ALWAYS F token(const uint32_t* x) {
        const __m256 v = _mm256_broadcast_ss((const float*)x);
        return {v, v};
    }
    static ALWAYS void dot(Acc& acc, F w, F x) { acc = fma(w, x, acc); }
};

struct Int16 : Integers {  // inputs 0 and 2, 1 and 3 of every four, as they come out of words
    using As = Int16;
    using Operand = V;
    using Token = int16_t;
    static constexpr int STEPS = 4, EACH = 2, PARTS = 4;
    static ALWAYS V token(const uint32_t* x) {
        const __m256i v = _mm256_set1_epi32((int)*x);
        return {v, v};
    }
    static ALWAYS void dot(Acc& acc, V w, V x) {
        acc = add(acc, {_mm256_madd_epi16(w.low, x.low), _mm256_madd_epi16(w.high, x.high)});
    }
};

void widen(const uint8_t* x, bool narrow, int64_t inputs, int64_t K, float* to) {
    for (int64_t i = 0; i < inputs; i += LANES) {
        const Mask some = upto(inputs - i);
        store(to + i, some, narrow ? load((const uint16_t*)x + i, some) : load((const float*)x + i, some));
    }
    std::fill(to + inputs, to + K, 0.0f);
}

void widen(const int8_t* x, int64_t inputs, int64_t K, int16_t* to) {
    for (int64_t i = 0; i < K; i += 4)
        for (int j : {0, 2, 1, 3}) *to++ = i + j < inputs ? x[i + j] : 0;
}

// Tokens as they are multiplied, in whole blocks.
const uint8_t* as_operands(const uint8_t* x, Product& p, Buffer<uint8_t>& own) {
    const bool floats = p.kind < 6;
    const int64_t bytes = p.inputs * p.bytes(), size = p.K * (floats ? sizeof(float) : sizeof(int16_t));
    own = buffer<uint8_t>(p.M * size);
    std::atomic<int64_t> turn{0};
    together(p.M > 1 ? p.threads : 1, [&] {
        for (int64_t m; (m = turn++) < p.M;)
            if (floats)
                widen(x + m * bytes, p.narrow_x, p.inputs, p.K, (float*)(own.get() + m * size));
            else
                widen((const int8_t*)x + m * bytes, p.inputs, p.K, (int16_t*)(own.get() + m * size));
    });
    p.inputs = p.K;
    return own.get();
}

ALWAYS __m256i half(const uint8_t* at, int i) { return _mm256_loadu_si256((const __m256i*)at + i); }

// Four bits, any 16 values; input i's code at bit 4 (i / 2) + 16 (i % 2) of an output's word.
struct Floats4 : Float {
    static constexpr int BYTES = 64;
    static constexpr bool SCALED = true;
    struct Raw {
        V v;
    };
    F table;
    explicit Floats4(const void* values) : table(anywhere((const float*)values + 16)) {}
    ALWAYS Raw load(const uint8_t* w, int) const { return {{half(w, 0), half(w, 1)}}; }
    template <int S>
    ALWAYS F part(const Raw& raw) const {
        constexpr int at = S / 2 * 4 + S % 2 * 16;
        auto of = [&](__m256i v) HERE {
            return lookup(at ? _mm256_srli_epi32(v, at) : v, _mm256_slli_epi32(v, 28 - at), table);
        };
        return {of(raw.v.low), of(raw.v.high)};
    }
    template <int S>
    ALWAYS F scaled(const Raw& raw, F s) const {
        return mul(part<S>(raw), s);
    }
};

// Values that bfloat16 holds: their two bytes are looked up, those of 32 codes at once.
struct Of4 : Float {
    static constexpr int BYTES = 64;
    using Raw = Floats4::Raw;
    __m256i low, high;
    explicit Of4(const void* values) {
        const __m128i* at = (const __m128i*)values;
        const __m128i a = _mm_loadu_si128(at), b = _mm_loadu_si128(at + 1), byte = _mm_set1_epi16(255);
        low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)));
        high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
    }
    ALWAYS Raw load(const uint8_t* w, int) const { return {{half(w, 0), half(w, 1)}}; }
    template <int S>
    ALWAYS F part(const Raw& raw) const {
        auto of = [&](__m256i v) HERE {
            const __m256i code = _mm256_and_si256(S / 2 % 2 ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
            const __m256i l = _mm256_shuffle_epi8(low, code), h = _mm256_shuffle_epi8(high, code);
            const __m256i first = _mm256_set1_epi16(255);  // of the two bytes of a word; S / 4 says which
            const __m256i both = S / 4 ? _mm256_or_si256(_mm256_srli_epi16(l, 8), _mm256_andnot_si256(first, h))
                                       : _mm256_or_si256(_mm256_and_si256(first, l), _mm256_slli_epi16(h, 8));
            const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
            return _mm256_castsi256_ps(S % 2 ? _mm256_and_si256(upper, both) : _mm256_slli_epi32(both, 16));
        };
        return {of(raw.v.low), of(raw.v.high)};
    }
};

struct Scaled4 : Of4 {
    static constexpr bool SCALED = true;
    using Of4::Of4;
    template <int S>
    ALWAYS F scaled(const Raw& raw, F s) const {
        return mul(part<S>(raw), s);
    }
};

struct OfBytes : Float {  // signed bytes, two inputs of an output side by side
    static constexpr int BYTES = 128;
    using Raw = At;
    explicit OfBytes(const void*) {}
    ALWAYS Raw load(const uint8_t* w, int) const { return {w}; }
    template <int S>
    ALWAYS F part(const Raw& raw) const {
        auto of = [&](int i) HERE {
            const __m256i both = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)(raw.at + 32 * (S / 2)) + i));
            return _mm256_cvtepi32_ps(_mm256_srai_epi32(S % 2 ? both : _mm256_slli_epi32(both, 24), S % 2 ? 8 : 24));
        };
        return {of(0), of(1)};
    }
};

struct Of8 : Float {  // 256 values
    static constexpr int BYTES = 128;
    using Raw = At;
    float table[256];
    explicit Of8(const void* values) {
        for (int i = 0; i < 256; i += LANES) store(table + i, widened((const uint16_t*)values + i));
    }
    ALWAYS Raw load(const uint8_t* w, int) const { return {w}; }
    template <int S>
    ALWAYS F part(const Raw& raw) const {
        auto of = [&](int i) HERE {
            const __m256i both = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(raw.at + 32 * (S / 2)) + i));
            const __m256i code = S % 2 ? _mm256_srli_epi32(both, 8) : _mm256_and_si256(both, _mm256_set1_epi32(255));
            return _mm256_i32gather_ps(table, code, 4);
        };
        return {of(0), of(1)};
    }
};

// float8, which half precision holds: four (e4m3) or five (e5m2) bits of exponent, moved to where that has its five.
template <int EXPONENT>
struct Float8 : OfBytes {
    using OfBytes::OfBytes;
    static constexpr float UNIT = EXPONENT == 4 ? 256 : 1;  // the two count exponents from 7 and from 15
    template <int S>
    ALWAYS F part(const Raw& raw) const {
        const __m256i both = half(raw.at + 32 * (S / 2), 0);
        __m256i v = S % 2 ? _mm256_andnot_si256(_mm256_set1_epi16(255), both) : _mm256_slli_epi16(both, 8);
        if (EXPONENT == 4) v = _mm256_and_si256(_mm256_srai_epi16(v, 1), _mm256_set1_epi16((short)0xbfff));
        const F found{_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
        return EXPONENT == 4 ? mul(found, all(UNIT)) : found;
    }
    // Whether this is what the table says; a code of no number is in no checkpoint.
    static bool is(const void* values) {
        bool same = true;
        for (int code = 0; code < 256; ++code) {
            const int bits = EXPONENT == 4 ? (code & 128) << 8 | (code & 127) << 7 : code << 8;
            const uint32_t wide = (uint32_t)((const uint16_t*)values)[code] << 16;
            float value;
            std::memcpy(&value, &wide, 4);
            same &= value != value || std::isinf(value) || value == _cvtsh_ss((uint16_t)bits) * UNIT;
        }
        return same;
    }
};

// Calls with the operands of a table of 256: what can be computed is not looked up.
template <class Call>
ALWAYS void of_bytes(const void* table, Call call) {
    if (Float8<4>::is(table)) return call((Float8<4>*)nullptr);
    if (Float8<5>::is(table)) return call((Float8<5>*)nullptr);
    call((Of8*)nullptr);
}

struct Nibbles : Int16 {
    static constexpr int BYTES = 64;
    using Raw = Floats4::Raw;
    explicit Nibbles(const void*) {}
    ALWAYS Raw load(const uint8_t* w, int) const { return {{half(w, 0), half(w, 1)}}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        auto of = [](__m256i v) HERE {
            constexpr int at = S % 2 * 8 + S / 2 * 4;
            return _mm256_and_si256(at ? _mm256_srli_epi16(v, at) : v, _mm256_set1_epi16(15));
        };
        return {of(raw.v.low), of(raw.v.high)};
    }
};

struct Bytes : Int16 {
    static constexpr int BYTES = 128;
    using Raw = At;
    explicit Bytes(const void*) {}
    ALWAYS Raw load(const uint8_t* w, int) const { return {w}; }
    template <int S>
    ALWAYS V part(const Raw& raw) const {
        auto of = [&](int i) HERE {
            const __m256i v = half(raw.at + 64 * (S / 2), i);
            return S % 2 ? _mm256_srli_epi16(v, 8) : _mm256_and_si256(v, _mm256_set1_epi16(255));
        };
        return {of(0), of(1)};
    }
};

// 128 inputs of 8 outputs, each with a table of its own: lanes are inputs, an accumulator is one output's.
struct OfRows : Float {
    static constexpr int OUTPUTS = 1, LINE = 8, INPUTS = 128, BYTES = 512, WORDS = 16, TABLE = 32;
    struct Raw {
        const uint8_t* at;
        F table;
    };
    const uint8_t* tables;
    explicit OfRows(const void* values) : tables((const uint8_t*)values) {}
    static ALWAYS F token(const uint32_t* x) { return ::load((const float*)x); }
    ALWAYS Raw load(const uint8_t* w, int r) const { return {w, widened((const uint16_t*)(tables + r * TABLE))}; }
    template <int S>
    ALWAYS F part(const Raw& raw) const {
        auto of = [&](int i) HERE {
            const __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(raw.at + 32 * (S % 2)) + i));
            return lookup(_mm256_srli_epi32(v, S / 2 * 4), _mm256_slli_epi32(v, 28 - S / 2 * 4), raw.table);
        };
        return {of(0), of(1)};
    }
};

}  // namespace
