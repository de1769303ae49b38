"""Tokens on their way into a product, in one pass: a Hadamard transform, ranges, integers or 8-bit floats."""

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)  # 1.5 2^23: adding it leaves no room for a fraction, ties go to even


@triton.jit
def round_half_even(x):
    """The nearest integer of a float32 below 2^22 in size."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def butterflies(x, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """Sylvester's `H x` for `x` `[SIZE]`, not scaled: sums and differences of neighbours 1, 2, 4 ... apart."""
    for i in tl.static_range(STEPS):
        x = tl.permute(tl.reshape(x, (SIZE >> (i + 1), 2, 1 << i)), (0, 2, 1))
        a, b = tl.split(x)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (SIZE,))
    return x


@triton.jit
def load_row(x_ptr, sign_ptr, start, K, SIZE: tl.constexpr, STEPS: tl.constexpr, SIGNS: tl.constexpr):
    """Some columns of a row in float32, transformed when there are steps."""
    k = (start + tl.arange(0, SIZE)).to(tl.int64)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if SIGNS:
        x *= tl.load(sign_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if STEPS > 0:
        x = butterflies(x, SIZE, STEPS) * (1.0 / SIZE**0.5)
    return x


@triton.jit
def float8_e4m3(x):
    """float32 within +-448 -> the byte of the nearest float8_e4m3fn, ties to even. On bits, for machines without it."""
    bits = x.to(tl.int32, bitcast=True)
    size = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    exponent = tl.maximum(((bits >> 23) & 0xFF) - 127, -6)
    step = ((127 + 3 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^(3 - e)
    code = round_half_even(size * step).to(tl.int32) + ((exponent + 6) << 3)  # a carry goes to the exponent by itself
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def store_row(
    x, q_ptr, scale, zero, start, K,
    LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, CONVERTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Some columns of a row, rounded to the grid (LOW == HIGH: to the type they are stored in)."""
    k = (start + tl.arange(0, SIZE)).to(tl.int64)
    if LOW == HIGH:
        q = x.to(q_ptr.dtype.element_ty)
    else:
        x = tl.minimum(tl.maximum(tl.div_rn(x, scale) + zero, LOW), HIGH)
        if q_ptr.dtype.element_ty != tl.uint8:
            q = (round_half_even(x) - SHIFT).to(tl.int8)
        elif CONVERTS:
            q = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            q = float8_e4m3(x)
    tl.store(q_ptr + k, q, mask=k < K)


@triton.jit
def tokens_fwd_kernel(
    x_ptr,  # [M, K], rows x_row apart
    sign_ptr,  # [K], or anything
    range_ptr,  # float32 [entries] scales of a static range, or anything
    zero_ptr,  # int32 [entries], or anything
    index_ptr,  # int64 [M]: which entry a token has, or anything
    q_ptr,  # [M, K] int8, or uint8 for the bytes of floats, or x's type when nothing is rounded
    s_ptr,  # float32 [M]
    z_ptr,  # float32 [M]
    K,
    x_row,
    LOW: tl.constexpr,  # the grid; LOW == HIGH: only transform
    HIGH: tl.constexpr,
    SHIFT: tl.constexpr,  # taken off values and zero points, so that unsigned ones fit int8
    ZERO: tl.constexpr,  # there are zero points
    STATIC: tl.constexpr,
    TABLE: tl.constexpr,  # the static range is an entry of a table
    CONVERTS: tl.constexpr,  # the machine rounds to float8_e4m3fn
    ONCE: tl.constexpr,  # SIZE holds a whole row, which is read once
    SIZE: tl.constexpr,  # columns at once
    STEPS: tl.constexpr,  # log2 of SIZE for a transform in blocks of it, else 0
    SIGNS: tl.constexpr,
):
    """One program a token: `code = clamp(round(x / scale + zero))`."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row
    q_ptr += row * K
    scale, zero = 1.0, 0.0
    if LOW != HIGH:
        if STATIC:
            entry = tl.load(index_ptr + row).to(tl.int64) if TABLE else 0
            scale = tl.load(range_ptr + entry)
            if ZERO:
                zero = tl.load(zero_ptr + entry).to(tl.float32)
        else:
            low, high = 0.0, 0.0
            if ONCE:
                whole = load_row(x_ptr, sign_ptr, 0, K, SIZE, STEPS, SIGNS)
                low, high = tl.minimum(low, tl.min(whole, 0)), tl.maximum(high, tl.max(whole, 0))
            else:
                for start in range(0, K, SIZE):
                    x = load_row(x_ptr, sign_ptr, start, K, SIZE, STEPS, SIGNS)
                    low, high = tl.minimum(low, tl.min(x, 0)), tl.maximum(high, tl.max(x, 0))
            if ZERO:
                scale = tl.div_rn(high - low, tl.cast(HIGH - LOW, tl.float32))
            elif LOW == 0:
                scale = tl.div_rn(high, tl.cast(HIGH, tl.float32))
            else:
                scale = tl.maximum(tl.div_rn(low, tl.cast(LOW, tl.float32)), tl.div_rn(high, tl.cast(HIGH, tl.float32)))
            scale = tl.where(scale > 0, scale, 1.0)
            if ZERO:
                zero = tl.minimum(tl.maximum(LOW - tl.div_rn(low, scale), LOW), HIGH)
                zero = round_half_even(zero)
        tl.store(s_ptr + row, scale)
        if ZERO:
            tl.store(z_ptr + row, zero - SHIFT)
    if ONCE and LOW != HIGH and not STATIC:
        store_row(whole, q_ptr, scale, zero, 0, K, LOW, HIGH, SHIFT, CONVERTS, SIZE)
    else:
        for start in range(0, K, SIZE):
            x = load_row(x_ptr, sign_ptr, start, K, SIZE, STEPS, SIGNS)
            store_row(x, q_ptr, scale, zero, start, K, LOW, HIGH, SHIFT, CONVERTS, SIZE)
