"""What a format is to the main loop: a decode function and a function that loads its ranges.

A decode function makes two weights a plane out of the words of a slot. `w0`, `w1`, `w2` are words `[BN, 1, 8]`, `plane`
`[1, PLANES, 1]`; `s0, z0` scale and zero of the even column of each pair, `s1, z1` of the odd one (the same tensors
unless groups end anywhere). The result, `[BN, PLANES, 8]` twice, is float32, to be rounded once as the reference rounds
it; or the 16 bits of numbers that are in the type of the product already; or integers without scale, for int8 products.

A range function gives scale and zero point of columns `k` `[1, ...]` as `[BN, ...]`. Everything it loads has four bytes
or more, because a copy that runs ahead of the loop moves no less.
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
def integers(w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """`(code - z) s`."""
    code = code_pairs(w0, w1, w2, plane, BITS)
    if PTX:
        return integers_ptx(code, s0, z0, DTYPE)
    else:
        return integer(code & 0xFFFF, s0, z0, DTYPE), integer(code >> 16, s1, z1, DTYPE)


@triton.jit
def integer(code, s, z, DTYPE: tl.constexpr):
    """`(code - z) s`; an int8 operand keeps its scale for after the product."""
    if tl.int8 == DTYPE:
        return (code - z).to(tl.int32)
    else:
        return (code.to(tl.float32) - z) * number(s, DTYPE)


@triton.jit
def signed_integers(
    w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):
    """`(value - z) s` of signed values: a code less the middle one. `z` is any float, so it cannot take that on."""
    code, middle = code_pairs(w0, w1, w2, plane, BITS), 1 << (BITS - 1)
    return integer((code & 0xFFFF) - middle, s0, z0, DTYPE), integer((code >> 16) - middle, s1, z1, DTYPE)


@triton.jit
def number(s, DTYPE: tl.constexpr):
    """A scale in float32: it is one, or the 16 bits of one in the type of the product."""
    if s.dtype == tl.int16:
        if tl.float16 == DTYPE:
            return s.to(tl.float16, bitcast=True).to(tl.float32)
        else:
            return (s.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return s


@triton.jit
def twice(bits):
    """16 bits in both halves of a word."""
    return (bits & 0xFFFF) | (bits << 16)


FLOAT16_ASM = tl.constexpr(
    "{ .reg .b32 t; or.b32 t, $2, 0x64006400; add.rn.f16x2 t, t, $4; mul.rn.f16x2 t, t, $3; mov.b32 {$0, $1}, t; }"
)
BFLOAT16_ASM = tl.constexpr(
    "{ .reg .b32 t, u; mov.b32 u, 0x3F803F80; or.b32 t, $2, 0x43004300; fma.rn.bf16x2 t, t, u, $4;"
    " mov.b32 u, 0x80008000; fma.rn.bf16x2 t, t, $3, u; mov.b32 {$0, $1}, t; }"
)


@triton.jit
def integers_ptx(code, s, z, DTYPE: tl.constexpr):
    """`(code - z) s` of two codes at once, as 16 bits each.

    A code put under the mantissa of 128 (of 1024 in float16) is the number 128 + code. Taking 128 + z off is exact,
    the product is rounded once. Multiply-adds, because sm_80 has no other arithmetic on two bfloat16.
    """
    scale = twice(s.to(tl.int32))
    if tl.float16 == DTYPE:
        offset = twice(0xE400 + z)  # -(1024 + z)
        return tl.inline_asm_elementwise(
            FLOAT16_ASM, "=h,=h,r,r,r", [code, scale, offset], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )
    else:
        offset = twice(0xC300 + z)  # -(128 + z)
        return tl.inline_asm_elementwise(
            BFLOAT16_ASM, "=h,=h,r,r,r", [code, scale, offset], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )


@triton.jit
def levels(w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """`table[code] s t`; the entry behind the last level is t, the scale of the tensor."""
    code = code_pairs(w0, w1, w2, plane, BITS)
    whole = tl.load(table_ptr + (1 << BITS))
    even = tl.load(table_ptr + (code & 0xFFFF)) * s0 * whole
    odd = tl.load(table_ptr + (code >> 16)) * s1 * whole
    return even, odd


@triton.jit
def codebooks(w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """`table[s, code]`: the "scale" of a block is the number of its codebook."""
    code = code_pairs(w0, w1, w2, plane, BITS)
    even = tl.load(table_ptr + (s0.to(tl.int64) << BITS) + (code & 0xFFFF))
    odd = tl.load(table_ptr + (s1.to(tl.int64) << BITS) + (code >> 16))
    return even, odd


@triton.jit
def float4(w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """E2M1 times `s t`: MXFP4 and NVFP4. `t` is the first entry of the table."""
    code = code_pairs(w0, w1, w2, plane, 4)
    whole = tl.load(table_ptr)
    return e2m1(code & 0xFFFF) * s0 * whole, e2m1(code >> 16) * s1 * whole


@triton.jit
def e2m1(code):
    """0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign. Halves are counted as integers: no subnormal float is met."""
    size = code & 7
    halves = tl.where(size < 2, size, (2 | (size & 1)) << tl.maximum((size >> 1) - 1, 0))
    value = halves.to(tl.float32) * 0.5
    return tl.where(code > 7, -value, value)


@triton.jit
def float8_e4m3(
    w0, w1, w2, plane, s0, s1, z0, z1, table_ptr, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):
    """E4M3 times `s t`, on bits, for machines that lack the type. `t` is the first entry of the table."""
    code = code_pairs(w0, w1, w2, plane, 8)
    whole = tl.load(table_ptr)
    return e4m3(code & 0xFFFF) * s0 * whole, e4m3(code >> 16) * s1 * whole


@triton.jit
def e4m3(code):
    """The value of a byte of float8_e4m3fn: the pattern in the place of float32's, then the exponent's bias."""
    size = code & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)  # subnormals count 2^-9
    return tl.where(code > 0x7F, -value, value)


@triton.jit
def load_blocks(ptr, n, N, k, K, group):
    """A `[G, N]` tensor where columns k fall -> `[BN, ...]`; 0 outside."""
    at = (k // group).to(tl.int64) * N + n[:, None, None]
    return tl.load(ptr + at, mask=(n[:, None, None] < N) & (k < K), other=0)


@triton.jit
def scales(s_ptr, z_ptr, n, N, k, K, group, ZERO: tl.constexpr):
    """A float (or a codebook's number), and a constant zero point."""
    return load_blocks(s_ptr, n, N, k, K, group), ZERO


@triton.jit
def scales_and_zeros(s_ptr, z_ptr, n, N, k, K, group, ZERO: tl.constexpr):
    """A float each."""
    return load_blocks(s_ptr, n, N, k, K, group), load_blocks(z_ptr, n, N, k, K, group)


@triton.jit
def pairs(s_ptr, z_ptr, n, N, k, K, group, ZERO: tl.constexpr):
    """16 bits each of one word: the scale in the type of the product, the zero point."""
    both = load_blocks(s_ptr, n, N, k, K, group)
    return (both & 0xFFFF).to(tl.int16), both >> 16


@triton.jit
def bytes_of(s_ptr, n, N, k, K, group):
    """A byte a block: four neighbours along K are one word."""
    return (load_blocks(s_ptr, n, N, k, K, 4 * group) >> (8 * ((k // group) % 4))) & 0xFF


@triton.jit
def powers(s_ptr, z_ptr, n, N, k, K, group, ZERO: tl.constexpr):
    """E8M0: `2^(byte - 127)`, whose smallest is half of float32's smallest normal."""
    byte = bytes_of(s_ptr, n, N, k, K, group)
    return tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True), ZERO


@triton.jit
def small_floats(s_ptr, z_ptr, n, N, k, K, group, ZERO: tl.constexpr):
    """E4M3."""
    return e4m3(bytes_of(s_ptr, n, N, k, K, group)), ZERO
