// How codes become operands. `Raw` is a block as loaded (of the r-th accumulator), `part<S>` the operand of its S-th
// inputs. What they are depends on the machine: avx512_operands.h, avx2_operands.h.
#pragma once
#include "ahead.h"
#include "vectors.h"

namespace {

// Lanes are outputs: all of them are multiplied by the same inputs.
struct Outputs {
    static constexpr int OUTPUTS = LANES, LINE = LANES, INPUTS = 8;  // of an accumulator, of a block
    static constexpr int WORDS = 1, TABLE = 0;                       // of a token's operand; bytes of an own table
    static constexpr bool SCALED = false;                            // multiplied by scales when written down
    static constexpr bool DECODES = true;                            // written down for many tokens
};

struct Floats : Outputs {
    using Acc = F;
    static constexpr bool INTEGERS = false;
    static ALWAYS Acc zero() { return all(0.0f); }
    static ALWAYS F number(Acc acc) { return acc; }
};

struct Integers : Outputs {
    using Acc = V;
    static constexpr bool INTEGERS = true;
    static ALWAYS Acc zero() { return all(0); }
    static ALWAYS F number(Acc acc) { return ::number(acc); }
};

struct At {  // a block that stays where it is until an operand of it is needed
    const uint8_t* at;
};

}  // namespace

#ifdef __AVX512BF16__
#include "avx512_operands.h"
#else
#include "avx2_operands.h"
#endif

namespace {

template <class Of>
struct Decoded : Of {  // operands as they are, 16 outputs
    static constexpr int BYTES = 64 * Of::STEPS;
    using Raw = At;
    explicit Decoded(const void*) {}
    ALWAYS Raw load(const uint8_t* w, int) const { return {w}; }
    template <int S>
    ALWAYS typename Of::Operand part(const Raw& raw) const {
        return held<typename Of::Operand>(raw.at + 64 * S);
    }
};

// Where the n-th output begins; `row`: bytes of a row of blocks.
template <class W>
ALWAYS int64_t place(int64_t n, int64_t row) {
    return n / W::LINE * row + n % W::LINE * (W::BYTES / W::LINE);
}

// Writes down the operands of a block of 16 outputs.
template <class W>
ALWAYS void hold(const W& of, const uint8_t* w, int64_t, F s, uint8_t* to) {
    const typename W::Raw raw = of.load(w, 0);
    each<W::STEPS>([&](auto i) HERE {
        if constexpr (W::SCALED)
            hold(of.template scaled<i>(raw, s), to + 64 * i);
        else
            hold(of.template part<i>(raw), to + 64 * i);
    });
}

ALWAYS void hold(const OfRows& of, const uint8_t* w, int64_t row, F, uint8_t* to) {
    each<OfRows::PARTS>([&](auto s) HERE {
        OfRows::Operand rows[16];
        each<16>([&](auto i) HERE { rows[i] = of.template part<s>(of.load(w + place<OfRows>(i, row), i)); });
        transpose(rows);
        each<16>([&](auto i) HERE { hold(rows[i], to + 64 * (16 * s + i)); });
    });
}

// What the codes of 16 outputs and some columns of a group are, operand by operand.
template <class W, class X>
ALWAYS void put_down(const Product& p, int64_t n, int64_t k, int64_t columns, int64_t g, uint8_t* to) {
    constexpr int HELD = 64 * X::STEPS * (W::INPUTS / X::INPUTS);  // bytes of a block written down
    const int64_t row = p.K / W::INPUTS * W::BYTES, blocks = columns / W::INPUTS;
    const W of((const uint8_t*)p.table + p.at(g, n) * W::TABLE);
    const uint8_t* from = p.w + place<W>(n, row) + k / W::INPUTS * W::BYTES;
    for (int64_t b = 0, end; b < blocks; b = end) {  // as far as scales reach, where they are multiplied
        const int64_t own = W::SCALED ? (k + b * W::INPUTS) / p.group : g;
        end = W::SCALED ? std::min(blocks, ((own + 1) * p.group - k) / W::INPUTS) : blocks;
        const F scale = W::SCALED ? ranges(p.s, p.at(own, n), p.narrow_s) : all(1.0f);
        for (; b < end; ++b, to += HELD) {
            const uint8_t* block = from + b * W::BYTES;
            if constexpr (W::OUTPUTS == LANES) ahead<W::BYTES>(block);
            hold(of, block, row, scale, to);
        }
    }
}

}  // namespace
