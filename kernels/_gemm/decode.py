"""What a format is to the main loop: a decode function and a function that loads its ranges.

A decode function makes two weights a plane out of the words of a slot. `w0`, `w1`, `w2` are words `[BN, 1, 8]`, `plane`
`[1, PLANES, 1]`; `s0, z0` scale and zero of the even column of each pair, `s1, z1` of the odd one (the same tensors
unless groups end anywhere). The result, `[BN, PLANES, 8]` twice, is float32, to be rounded once as the reference rounds
it; or the 16 bits of numbers that are in the type of the product already; or integers without scale, for int8 products.

A range function gives scale and zero point of columns `k` `[1, ...]` as `[BN, ...]`; `EVEN` says that none of them
is outside. Everything it loads has four bytes or more, because a copy that runs ahead of the loop moves no less.
"""

import triton
import triton.language as tl


@triton.jit
def code_pairs(w0, w1, w2, plane, BITS: tl.constexpr):
    """Both codes of a pair, 16 bits apart in a word. 3 bits are 2 and 1: word 2 has the high ones of both others."""
    if BITS == 3:
        low = tl.where(plane < 8, w0, w1) >> (2 * (plane % 8))
        return (low & 0x00030003) | (((w2 >> plane) & 0x00010001) << 2)
    elif BITS == 6:
        low = tl.where(plane < 4, w0, w1) >> (4 * (plane % 4))
        return (low & 0x000F000F) | (((w2 >> (2 * plane)) & 0x00030003) << 4)
    else:
        return (w0 >> (BITS * plane)) & (((1 << BITS) - 1) * 0x00010001)


@triton.jit
def integers(
    w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, nought, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):
    """`(code - z) s`."""
    if PTX:
        return integers_ptx(w0, w1, w2, plane, s0, nought, DTYPE, BITS)
    else:
        code = code_pairs(w0, w1, w2, plane, BITS)
        return integer(code & 0xFFFF, s0, z0, DTYPE), integer(code >> 16, s1, z1, DTYPE)


@triton.jit
def integer(code, s, z, DTYPE: tl.constexpr):
    """`(code - z) s`; an int8 operand keeps its scale for after the product. `s` may be a word of `pairs`."""
    if tl.int8 == DTYPE:
        return (code - z).to(tl.int32)
    elif s.dtype != tl.int32:
        return (code.to(tl.float32) - z) * s
    elif tl.float16 == DTYPE:
        scale = s.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return (code - (((s >> 16) & 0xFFFF) - 0xE400)).to(tl.float32) * scale
    else:
        scale = (s << 16).to(tl.float32, bitcast=True)
        return (code - (((s >> 16) & 0xFFFF) - 0xC300)).to(tl.float32) * scale


@triton.jit
def signed_integers(
    w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, nought, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):
    """`(value - z) s` of signed values: a code less the middle one. `z` is any float, so it cannot take that on."""
    code, middle = code_pairs(w0, w1, w2, plane, BITS), 1 << (BITS - 1)
    return integer((code & 0xFFFF) - middle, s0, z0, DTYPE), integer((code >> 16) - middle, s1, z1, DTYPE)


HALVES_ASM = tl.constexpr("prmt.b32 $0, $2, $2, 0x1010; prmt.b32 $1, $2, $2, 0x3232;")


FLOAT16_ASM = tl.constexpr(
    "{ .reg .b32 t; shr.u32 t, $2, $3; lop3.b32 t, t, $4, $7, 0xEA; add.rn.f16x2 t, t, $6;"
    " mul.rn.f16x2 t, t, $5; mov.b32 {$0, $1}, t; }"
)
BFLOAT16_ASM = tl.constexpr(
    "{ .reg .b32 t, u; mov.b32 u, 0x3F803F80; shr.u32 t, $2, $3; lop3.b32 t, t, $4, $7, 0xEA;"
    " fma.rn.bf16x2 t, t, u, $6; mov.b32 u, 0x80008000; fma.rn.bf16x2 t, t, $5, u; mov.b32 {$0, $1}, t; }"
)
FLOAT16_PARTS_ASM = tl.constexpr(
    "{ .reg .b32 t, h; shr.u32 t, $2, $3; lop3.b32 t, t, $4, $7, 0xEA; shf.r.wrap.b32 h, $8, $8, $9;"
    " lop3.b32 t, h, $10, t, 0xEA; add.rn.f16x2 t, t, $6; mul.rn.f16x2 t, t, $5; mov.b32 {$0, $1}, t; }"
)
BFLOAT16_PARTS_ASM = tl.constexpr(
    "{ .reg .b32 t, u, h; mov.b32 u, 0x3F803F80; shr.u32 t, $2, $3; lop3.b32 t, t, $4, $7, 0xEA;"
    " shf.r.wrap.b32 h, $8, $8, $9; lop3.b32 t, h, $10, t, 0xEA; fma.rn.bf16x2 t, t, u, $6; mov.b32 u, 0x80008000;"
    " fma.rn.bf16x2 t, t, $5, u; mov.b32 {$0, $1}, t; }"
)


@triton.jit
def integers_ptx(w0, w1, w2, plane, pair, nought, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """`(code - z) s` of two codes at once, as 16 bits each.

    A code put under the mantissa of 128 (of 1024 in float16) is the number 128 + code: one instruction, `(w & mask) |
    magic`. Adding `-(128 + z)`, the other half of a word of `pairs`, is exact, the product is rounded once.
    Multiply-adds, because sm_80 has no other arithmetic on two bfloat16. 8 bits: `bytes_ptx`.
    """
    if BITS == 8 and tl.bfloat16 == DTYPE:
        return bytes_ptx(w0, plane, pair)
    LOW: tl.constexpr = 2 * BITS // 3 if BITS == 3 or BITS == 6 else BITS  # bits of the first part
    COUNT: tl.constexpr = 16 // LOW  # its fields in half a word
    scale, offset = tl.inline_asm_elementwise(
        HALVES_ASM, "=r,=r,r", [pair], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )
    # `nought` is 0: a constant that the assembler knows it would put into a register anew for every pair
    magic = (0x64006400 if tl.float16 == DTYPE else 0x43004300) | nought
    w = w0 if LOW == BITS else tl.where(plane < COUNT, w0, w1)
    shift, mask = LOW * (plane % COUNT), ((1 << LOW) - 1) * 0x00010001
    if LOW == BITS:
        ASM: tl.constexpr = FLOAT16_ASM if tl.float16 == DTYPE else BFLOAT16_ASM
        return tl.inline_asm_elementwise(
            ASM, "=h,=h,r,r,r,r,r,r", [w, shift, mask, scale, offset, magic],
            dtype=(tl.int16, tl.int16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        HIGH: tl.constexpr = BITS - LOW
        TWO: tl.constexpr = FLOAT16_PARTS_ASM if tl.float16 == DTYPE else BFLOAT16_PARTS_ASM
        turn, above = (HIGH * plane + 32 - LOW) % 32, (((1 << HIGH) - 1) << LOW) * 0x00010001
        return tl.inline_asm_elementwise(
            TWO, "=h,=h,r,r,r,r,r,r,r,r,r", [w, shift, mask, scale, offset, magic, w2, turn, above],
            dtype=(tl.int16, tl.int16), is_pure=True, pack=1,
        )  # fmt: skip


BYTES_ASM = tl.constexpr(
    "{ .reg .b32 t, u; .reg .f32 f, g; prmt.b32 t, $2, 0x4B000000, $3; prmt.b32 u, $2, 0x4B000000, $4;"
    " mov.b32 f, t; mov.b32 g, u; add.rn.f32 f, f, $6; add.rn.f32 g, g, $6; mul.rn.f32 f, f, $5; mul.rn.f32 g, g, $5;"
    " cvt.rn.bf16x2.f32 t, g, f; mov.b32 {$0, $1}, t; }"
)


@triton.jit
def bytes_ptx(w, plane, pair):
    """The same of 8 bits in bfloat16: a byte under the mantissa of 2^23 is a float32 with room for the product."""
    scale = (pair << 16).to(tl.float32, bitcast=True)
    offset = (((pair >> 16) & 0xFFFF) + (-0x35000000 - 0xC300)).to(tl.float32, bitcast=True)  # -(2^23 + z)
    even = plane + 0x7440  # bytes of the result: one of the word's, two zeros, 0x4B
    return tl.inline_asm_elementwise(
        BYTES_ASM,
        "=h,=h,r,r,r,f,f",
        [w, even, even + 2, scale, offset],
        dtype=(tl.int16, tl.int16),
        is_pure=True,
        pack=1,
    )


@triton.jit
def look_up(ptr, PTX: tl.constexpr):
    """Numbers of a table. In PTX, because a load that Triton knows of is copied ahead of the loop, each by itself."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [ptr], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(ptr)


@triton.jit
def levels(
    w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, nought, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):
    """`table[code] s t`; the entry behind the last level is t, the scale of the tensor."""
    code = code_pairs(w0, w1, w2, plane, BITS)
    whole = tl.load(table_ptr + (1 << BITS))
    even = look_up(table_ptr + (code & 0xFFFF), PTX) * s0 * whole
    odd = look_up(table_ptr + ((code >> 16) & 0xFFFF), PTX) * s1 * whole
    return even, odd


@triton.jit
def codebooks(
    w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, nought, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):
    """`table[s, code]`: the "scale" of a block is the number of its codebook."""
    code = code_pairs(w0, w1, w2, plane, BITS)
    even = look_up(table_ptr + (s0.to(tl.int64) << BITS) + (code & 0xFFFF), PTX)
    odd = look_up(table_ptr + (s1.to(tl.int64) << BITS) + ((code >> 16) & 0xFFFF), PTX)
    return even, odd


MXFP4_ASM = tl.constexpr(
    "{ .reg .b32 t, u, n; shf.r.wrap.b32 t, $2, $2, $3; and.b32 t, t, 0x01C001C0; shf.r.wrap.b32 u, $2, $2, $4;"
    " lop3.b32 t, u, 0x80008000, t, 0xEA; mov.b32 u, 0x7E807E80; mov.b32 n, 0x80008000; fma.rn.bf16x2 t, t, u, n;"
    " fma.rn.bf16x2 t, t, $5, n; mov.b32 {$0, $1}, t; }"
)


@triton.jit
def mxfp4(
    w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, nought, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):
    """E2M1 times a power of two.

    In PTX: the three bits below the sign, put where bfloat16's exponent ends, are the number times 2^-126, and every
    product with a power of two that bfloat16 holds is exact.
    """
    if PTX:
        scale = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $1, 0x3232;",
            "=r,r",
            [s0.to(tl.int32, bitcast=True)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        number, sign = (4 * plane + 26) % 32, (4 * plane + 20) % 32  # turns to the right
        return tl.inline_asm_elementwise(
            MXFP4_ASM, "=h,=h,r,r,r,r", [w0, number, sign, scale], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )
    else:
        code = code_pairs(w0, w1, w2, plane, 4)
        return e2m1(code & 0xFFFF) * s0, e2m1((code >> 16) & 0xFFFF) * s1


@triton.jit
def float4(
    w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, nought, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):
    """E2M1 times `s t`: NVFP4. `t` is the first entry of the table."""
    code = code_pairs(w0, w1, w2, plane, 4)
    whole = tl.load(table_ptr)
    return e2m1(code & 0xFFFF) * s0 * whole, e2m1((code >> 16) & 0xFFFF) * s1 * whole


@triton.jit
def e2m1(code):
    """0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign: the bits in float32's places are the number times 2^-126."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def float8_e4m3(
    w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, nought, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):
    """E4M3 times `s t`, on bits, for machines that lack the type. `t` is the first entry of the table."""
    code = code_pairs(w0, w1, w2, plane, 8)
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
    return load_blocks(s_ptr, n, N, k, K, GROUP, EVEN), ZERO


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
    return tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True), ZERO


@triton.jit
def small_floats(s_ptr, z_ptr, n, N, k, K, GROUP: tl.constexpr, ZERO: tl.constexpr, EVEN: tl.constexpr):
    """E4M3."""
    return e4m3(bytes_of(s_ptr, n, N, k, K, GROUP, EVEN)), ZERO
