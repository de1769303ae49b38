"""What a format is to the main loop: a decode function and a function that loads its ranges.

A decode function makes two weights a plane out of the words of a slot. `low` and `high` are words `[BN, 1, 8]`, high
the third of codes that have three (`words.fields`); `plane` `[1, PLANES, 1]` are planes of the block; `s0, z0` scale
and zero of the even column of each pair, `s1, z1` of the odd one (the same tensors unless groups end anywhere). The
result, `[BN, PLANES, 8]` twice, is float32, to be rounded once as the reference rounds it; or the 16 bits of numbers
that are in the type of the product already; or integers, for int8 products. With AFTER it is without scale, as are
those integers.

A range function gives scale and zero point of columns `k` `[1, ...]` as `[BN, ...]`; `EVEN` says that none of them
is outside. Everything it loads has four bytes or more, because a copy that runs ahead of the loop moves no less.
"""

import triton
import triton.language as tl


@triton.jit
def first_piece(low, high, plane, BITS: tl.constexpr):
    """(word, place, how many whole codes lie below it, mask) of each plane's code, or of what of it lies first:
    `words.fields`.
    """
    if BITS == 3 or BITS == 6:
        EACH: tl.constexpr = 16 // BITS
        COUNT: tl.constexpr = 24 // BITS  # planes of a word and of 8 bits of the third
        i = plane % COUNT
        above = (i >= EACH) & (i < COUNT - 1)
        below = tl.where(above, i - EACH, i) * (i < COUNT - 1).to(tl.int32)
        place = tl.where(above, plane // COUNT * 8, 0) + tl.where(i < COUNT - 1, below, EACH) * BITS
        mask = tl.where(i < COUNT - 1, (1 << BITS) - 1, (1 << (16 % BITS)) - 1) * 0x00010001
        return tl.where(above, high, low), place, below, mask
    else:
        return low, BITS * plane, plane, plane * 0 + ((1 << BITS) - 1) * 0x00010001


@triton.jit
def with_rest(code, high, plane, BITS: tl.constexpr):
    """Codes whose first piece lies at the bottom of each half, with the other piece where there is one."""
    if BITS == 3 or BITS == 6:
        COUNT: tl.constexpr = 24 // BITS
        REST: tl.constexpr = 16 % BITS
        mask = (((1 << BITS) - (1 << REST)) * 0x00010001) * (plane % COUNT == COUNT - 1).to(tl.int32)
        return code | ((high >> (plane // COUNT * 8 + 6 - REST)) & mask)
    else:
        return code


@triton.jit
def code_pairs(low, high, plane, BITS: tl.constexpr):
    """Both codes of a pair, 16 bits apart in a word."""
    w, place, _, mask = first_piece(low, high, plane, BITS)
    return with_rest((w >> place) & mask, high, plane, BITS)


@triton.jit
def integers(
    low, high, plane, s0, s1, z0, z1, table_ptr, nought,
    DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`(code - z) s`."""
    if PTX:
        return integers_ptx(low, high, plane, s0, nought, DTYPE, BITS, ZERO, AFTER)
    else:
        code = code_pairs(low, high, plane, BITS)
        return integer(code & 0xFFFF, s0, z0, DTYPE, AFTER), integer(code >> 16, s1, z1, DTYPE, AFTER)


@triton.jit
def integer(code, s, z, DTYPE: tl.constexpr, AFTER: tl.constexpr):
    """`(code - z) s`, without s where the sums are scaled. `s` may be a word of `pairs`."""
    if s.dtype == tl.int32:
        z = ((s >> 16) & 0xFFFF) - (0xE400 if tl.float16 == DTYPE else 0xC300)
    if tl.int8 == DTYPE:
        return (code - z).to(tl.int32)
    elif AFTER:
        return (code - z).to(tl.float32)
    elif s.dtype == tl.int32:
        return (code - z).to(tl.float32) * scale_of(s, DTYPE)
    else:
        return (code.to(tl.float32) - z) * s


@triton.jit
def scale_of(s, DTYPE: tl.constexpr):
    """The scale of a range: it, or the lower half of a word of `pairs`."""
    if s.dtype != tl.int32:
        return s
    elif tl.float16 == DTYPE:
        return s.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (s << 16).to(tl.float32, bitcast=True)


@triton.jit
def signed_integers(
    low, high, plane, s0, s1, z0, z1, table_ptr, nought,
    DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`(value - z) s` of signed values: a code less the middle one. `z` is any float, so it cannot take that on."""
    code, middle = code_pairs(low, high, plane, BITS), 1 << (BITS - 1)
    even, odd = (code & 0xFFFF) - middle, (code >> 16) - middle
    return integer(even, s0, z0, DTYPE, AFTER), integer(odd, s1, z1, DTYPE, AFTER)


HALVES_ASM = tl.constexpr("prmt.b32 $0, $2, $2, 0x1010; prmt.b32 $1, $2, $2, 0x3232;")
SPLIT_ASM = tl.constexpr("mov.b32 {$0, $1}, $2;")
FLOAT16_ASM = tl.constexpr("{ .reg .b32 t; fma.rn.f16x2 t, $2, $3, $4; mov.b32 {$0, $1}, t; }")
BFLOAT16_ASM = tl.constexpr("{ .reg .b32 t; fma.rn.bf16x2 t, $2, $3, $4; mov.b32 {$0, $1}, t; }")
FLOAT16_SCALED_ASM = tl.constexpr(
    "{ .reg .b32 t; fma.rn.f16x2 t, $2, $3, $4; mul.rn.f16x2 t, t, $5; mov.b32 {$0, $1}, t; }"
)
BFLOAT16_SCALED_ASM = tl.constexpr(
    "{ .reg .b32 t, u; fma.rn.bf16x2 t, $2, $3, $4; mov.b32 u, 0x80008000; fma.rn.bf16x2 t, t, $5, u;"
    " mov.b32 {$0, $1}, t; }"
)
FLOAT16_SUM_ASM = tl.constexpr("add.rn.f16x2 $0, $1, $2;")
BFLOAT16_SUM_ASM = tl.constexpr("{ .reg .b32 u; mov.b32 u, 0x3F803F80; fma.rn.bf16x2 $0, $1, u, $2; }")
OR_ASM, XOR_ASM = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0xEA;"), tl.constexpr("lop3.b32 $0, $1, $2, $3, 0x6A;")


@triton.jit
def twice(number, HALF: tl.constexpr):
    """A number in 16 bits, float16 or bfloat16, in both halves of a word."""
    if HALF:
        return (number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x00010001
    else:
        return ((number.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) * 0x00010001


@triton.jit
def masked(w, mask, to, ASM: tl.constexpr):
    """`(w & mask) | to`, or `^ to`, in one instruction."""
    return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [w, mask, to], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def integers_ptx(
    low, high, plane, pair, nought, DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, AFTER: tl.constexpr
):
    """`(code - z) s` of two codes at once, as 16 bits each; with AFTER `code - z`.

    A code put under the mantissa of 128 (of 1024 in float16) is the number 128 + code: one instruction, `(w & mask) |
    magic`. The mantissa has room for WINDOW codes, so that many share a shift: one that lies `up` places up makes
    `128 + 2^up code`. Times `2^-up` and less `2^-up 128 + z` it is the difference, exactly, in one multiply-add;
    `-(128 + z)` is the other half of a word of `pairs`. The product with the scale is rounded once. Multiply-adds,
    because sm_80 has no other arithmetic on two bfloat16.
    """
    HALF: tl.constexpr = tl.float16 == DTYPE
    if BITS == 8 and not HALF:
        return bytes_ptx(low, plane, pair, nought, ZERO, AFTER)
    WINDOW: tl.constexpr = (10 if HALF else 7) // BITS
    w, place, below, mask = first_piece(low, high, plane, BITS)
    up = below % WINDOW * BITS
    # `nought` is 0: a constant that the assembler knows it would put into a register anew for every pair
    magic = (0x64006400 if HALF else 0x43004300) | nought
    number = with_rest(masked(w >> (place - up), mask << up, magic, OR_ASM), high, plane, BITS)
    share = ((127 - up) << 23).to(tl.float32, bitcast=True)  # 2^-up
    top = share * (1024.0 if HALF else 128.0)
    scale, offset = halves(pair)
    if ZERO is not None:
        offset = twice(-top - ZERO, HALF)
    elif WINDOW > 1:
        top -= 1024.0 if HALF else 128.0
        offset = add_ptx(offset, twice(-top, HALF), HALF)
    return multiplied_ptx(number, twice(share, HALF), offset, scale, HALF, AFTER)


@triton.jit
def halves(pair):
    """Each half of a word, twice: scale and what takes the zero point off."""
    return tl.inline_asm_elementwise(HALVES_ASM, "=r,=r,r", [pair], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def add_ptx(a, b, HALF: tl.constexpr):
    """The sums of the halves of words."""
    ASM: tl.constexpr = FLOAT16_SUM_ASM if HALF else BFLOAT16_SUM_ASM
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def multiplied_ptx(number, share, offset, scale, HALF: tl.constexpr, AFTER: tl.constexpr):
    """`(number share + offset) scale` of the halves of words, without scale with AFTER, as 16 bits each."""
    if AFTER:
        ASM: tl.constexpr = FLOAT16_ASM if HALF else BFLOAT16_ASM
        return tl.inline_asm_elementwise(
            ASM, "=h,=h,r,r,r", [number, share, offset], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )
    else:
        SCALED: tl.constexpr = FLOAT16_SCALED_ASM if HALF else BFLOAT16_SCALED_ASM
        return tl.inline_asm_elementwise(
            SCALED, "=h,=h,r,r,r,r", [number, share, offset, scale], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )


@triton.jit
def bytes_ptx(w, plane, pair, nought, ZERO: tl.constexpr, AFTER: tl.constexpr):
    """The same of 8 bits in bfloat16, whose mantissa has 7.

    The seven low bits make `128 + low`; the eighth turns 256 into 128 by the last bit of its exponent, so that their
    difference is `code - 128`; `128 - z` is added. All three are exact.
    """
    w = w >> (8 * plane)
    number = masked(w, 0x007F007F, 0x43004300 | nought, OR_ASM)
    less = masked(w, 0x00800080, (0xC380C380 - (1 << 32)) | nought, XOR_ASM)  # -256, or -128
    code = add_ptx(number, less, False)
    scale, _ = halves(pair)
    one = plane * 0 + 0x3F803F80
    if ZERO is None:
        offset = twice((128 + 0xC300 - ((pair >> 16) & 0xFFFF)).to(tl.float32), False)
        return multiplied_ptx(code, one, offset, scale, False, AFTER)
    elif ZERO != 128:
        offset = twice((plane * 0 + (128 - ZERO)).to(tl.float32), False)
        return multiplied_ptx(code, one, offset, scale, False, AFTER)
    elif AFTER:
        return tl.inline_asm_elementwise(SPLIT_ASM, "=h,=h,r", [code], dtype=(tl.int16, tl.int16), is_pure=True, pack=1)
    else:
        return multiplied_ptx(code, scale, plane * 0 + (0x80008000 - (1 << 32)), scale, False, True)


ADDED_ASM = tl.constexpr("ld.global.nc.f32 $0, [$1];")
LOAD_ASM = tl.constexpr("{ .reg .b64 t; mov.b64 t, {$1, $2}; ld.global.nc.f32 $0, [t]; }")


@triton.jit
def look_up(ptr, code, BITS: tl.constexpr, PTX: tl.constexpr):
    """Numbers of tables of codes of so many bits, which begin at multiples of their size.

    In PTX, because a load that Triton knows of is copied ahead of the loop, each by itself; and because a code then
    joins its address by one instruction, `(w & mask) | address`, where memory is aligned as the table is.
    """
    if PTX and BITS <= 6:
        at = ptr.to(tl.int64)
        return tl.inline_asm_elementwise(
            LOAD_ASM, "=f,r,r", [at.to(tl.int32) | (code << 2), (at >> 32).to(tl.int32)],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    elif PTX:
        return tl.inline_asm_elementwise(ADDED_ASM, "=f,l", [ptr + code], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.load(ptr + code)


@triton.jit
def levels(
    low, high, plane, s0, s1, z0, z1, table_ptr, nought,
    DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`table[code] s`."""
    code = code_pairs(low, high, plane, BITS)
    mask: tl.constexpr = (1 << BITS) - 1
    return look_up(table_ptr, code & mask, BITS, PTX) * s0, look_up(table_ptr, (code >> 16) & mask, BITS, PTX) * s1


@triton.jit
def scaled_levels(
    low, high, plane, s0, s1, z0, z1, table_ptr, nought,
    DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`table[code] s t`; the entry behind the last level is t, the scale of the tensor."""
    even, odd = levels(low, high, plane, s0, s1, z0, z1, table_ptr, nought, DTYPE, BITS, ZERO, AFTER, PTX)
    whole = tl.load(table_ptr + (1 << BITS))
    return even * whole, odd * whole


@triton.jit
def codebooks(
    low, high, plane, s0, s1, z0, z1, table_ptr, nought,
    DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`table[s, code]`: the "scale" of a block is the number of its codebook."""
    code = code_pairs(low, high, plane, BITS)
    mask: tl.constexpr = (1 << BITS) - 1
    even = look_up(table_ptr + (s0.to(tl.int64) << BITS), code & mask, BITS, PTX)
    odd = look_up(table_ptr + (s1.to(tl.int64) << BITS), (code >> 16) & mask, BITS, PTX)
    return even, odd


E2M1 = (
    "{ .reg .b32 t, u, n; shf.r.wrap.b32 t, $2, $2, $3; and.b32 t, t, 0x01C001C0; shf.r.wrap.b32 u, $2, $2, $4;"
    " lop3.b32 t, u, 0x80008000, t, 0xEA; mov.b32 u, 0x7E807E80; mov.b32 n, 0x80008000; fma.rn.bf16x2 t, t, u, n;"
)
E2M1_ASM = tl.constexpr(E2M1 + " mov.b32 {$0, $1}, t; }")
E2M1_SCALED_ASM = tl.constexpr(E2M1 + " fma.rn.bf16x2 t, t, $5, n; mov.b32 {$0, $1}, t; }")
UPPER_ASM = tl.constexpr("prmt.b32 $0, $1, $1, 0x3232;")


@triton.jit
def mxfp4(
    low, high, plane, s0, s1, z0, z1, table_ptr, nought,
    DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """E2M1 `s`, exact where a power of two or E4M3 is the scale."""
    if PTX:
        return e2m1_ptx(low, plane, s0, AFTER)
    else:
        code = code_pairs(low, high, plane, 4)
        even, odd = e2m1(code & 0xFFFF), e2m1((code >> 16) & 0xFFFF)
        return (even, odd) if AFTER else (even * s0, odd * s1)


@triton.jit
def e2m1_ptx(w, plane, s, AFTER: tl.constexpr):
    """The same in bfloat16, which holds s.

    The three bits below the sign, put where bfloat16's exponent ends, are the number times 2^-126.
    """
    number, sign = (4 * plane + 26) % 32, (4 * plane + 20) % 32  # turns to the right
    if AFTER:
        return tl.inline_asm_elementwise(
            E2M1_ASM, "=h,=h,r,r,r", [w, number, sign], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )
    else:
        bits = s.to(tl.int32, bitcast=True)
        scale = tl.inline_asm_elementwise(UPPER_ASM, "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1)
        return tl.inline_asm_elementwise(
            E2M1_SCALED_ASM, "=h,=h,r,r,r,r", [w, number, sign, scale], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )


@triton.jit
def float4(
    low, high, plane, s0, s1, z0, z1, table_ptr, nought,
    DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """E2M1 `s t`: `t` is the first entry of the table."""
    even, odd = mxfp4(low, high, plane, s0, s1, z0, z1, table_ptr, nought, DTYPE, BITS, ZERO, AFTER=False, PTX=False)
    whole = tl.load(table_ptr)
    return even * whole, odd * whole


@triton.jit
def e2m1(code):
    """0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign: the bits in float32's places are the number times 2^-126."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def float8_e4m3(
    low, high, plane, s0, s1, z0, z1, table_ptr, nought,
    DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """E4M3 times `s t`, on bits, for machines that lack the type. `t` is the first entry of the table."""
    code = code_pairs(low, high, plane, 8)
    whole = tl.load(table_ptr)
    return e4m3(code & 0xFFFF) * s0 * whole, e4m3(code >> 16) * s1 * whole


@triton.jit
def e4m3(code):
    """The value of a byte of float8_e4m3fn: the bits in float32's places are the number times 2^-120."""
    bits = ((code & 0x7F) << 20) | ((code & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def load_blocks(ptr, n, N, k, K, GROUP: tl.constexpr, EVEN: tl.constexpr):
    """A `[G, N]` tensor where columns k fall -> `[BN, ...]`; 0 outside."""
    rows = n[:, None, None]
    at = ptr + (k // GROUP).to(tl.int64) * N + rows
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(rows < N) & (k < K), other=0)


@triton.jit
def scales(s_ptr, z_ptr, n, N, k, K, GROUP: tl.constexpr, ZERO: tl.constexpr, EVEN: tl.constexpr):
    """A float (or a codebook's number), and a constant zero point."""
    return load_blocks(s_ptr, n, N, k, K, GROUP, EVEN), 0 if ZERO is None else ZERO


@triton.jit
def scales_and_zeros(s_ptr, z_ptr, n, N, k, K, GROUP: tl.constexpr, ZERO: tl.constexpr, EVEN: tl.constexpr):
    """A float each."""
    return load_blocks(s_ptr, n, N, k, K, GROUP, EVEN), load_blocks(z_ptr, n, N, k, K, GROUP, EVEN)


@triton.jit
def pairs(s_ptr, z_ptr, n, N, k, K, GROUP: tl.constexpr, ZERO: tl.constexpr, EVEN: tl.constexpr):
    """16 bits each of one word, as `affine_ranges` puts them: the scale, and what takes the zero point off."""
    return load_blocks(s_ptr, n, N, k, K, GROUP, EVEN), 0


@triton.jit
def bytes_of(s_ptr, n, N, k, K, GROUP: tl.constexpr, EVEN: tl.constexpr):
    """A byte a block: four neighbours along K are one word."""
    return (load_blocks(s_ptr, n, N, k, K, 4 * GROUP, EVEN) >> (8 * ((k // GROUP) % 4))) & 0xFF


@triton.jit
def powers(s_ptr, z_ptr, n, N, k, K, GROUP: tl.constexpr, ZERO: tl.constexpr, EVEN: tl.constexpr):
    """E8M0: `2^(byte - 127)`, whose smallest is half of float32's smallest normal."""
    byte = bytes_of(s_ptr, n, N, k, K, GROUP, EVEN)
    return tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True), 0


@triton.jit
def small_floats(s_ptr, z_ptr, n, N, k, K, GROUP: tl.constexpr, ZERO: tl.constexpr, EVEN: tl.constexpr):
    """E4M3."""
    return e4m3(bytes_of(s_ptr, n, N, k, K, GROUP, EVEN)), 0
