"""The main loop: `y^T = W x^T`, the weight decoded in registers on its way from memory to the tensor cores.

The product is transposed because the left operand may come from registers on every machine: what a thread loads is
then what it multiplies, and no decoded weight passes through shared memory. README.md has the layout.
"""

import triton
import triton.language as tl

from hf_quant.kernels._gemm.decode import scale_of

# How many columns share a scale, as a block of the shuffled layout sees it. One range a row is one a block:
# loaded before the loop it would have a layout of its own, and Triton would exchange weights instead of scales.
BLOCK, PLANE, ELEMENT = (tl.constexpr(i) for i in range(1, 4))


@triton.jit
def round_to_bfloat16(x):
    """float32 -> the nearest bfloat16, ties to even, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_words(
    q_ptr, row_block, N, KB, kb, J: tl.constexpr, WORDS: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Word J of every slot of some blocks: `[BN / 16]` rows of blocks -> `[BN, 1, 8]`. A reshape, no data moves."""
    at = q_ptr + (((row_block * KB + kb) * WORDS + J) * 128)[:, None] + tl.arange(0, 128)[None, :]
    w = tl.load(at) if EVEN else tl.load(at, mask=((row_block * 16 < N) & (kb < KB))[:, None], other=0)
    w = tl.reshape(w, (BN // 16, 8, 4, 2, 2))  # g, t, k half, row half
    w = tl.permute(w, (0, 4, 1, 3, 2))
    return tl.reshape(w, (BN, 1, 8))


@triton.jit
def load_ranges(
    s_ptr, z_ptr, n, N, K, k, odd: tl.constexpr,
    PLANES: tl.constexpr, RANGES: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(scales, zero points) of a slice that begins at column k, as finely as groups cut it: of the `odd` neighbour of
    each pair.
    """
    COLUMNS: tl.constexpr = 16 * PLANES
    LOW: tl.constexpr = UNIT // 2  # planes whose pairs are neighbours
    plane = tl.arange(0, PLANES)[None, :, None]
    at = tl.zeros((1, 1, 1), tl.int32) + k
    if SPAN == PLANE and COLUMNS % GROUP == 0 and COLUMNS // GROUP <= 4:  # each group's once
        s, z = RANGES(s_ptr, z_ptr, n, N, at, K, GROUP, ZERO, EVEN)
        for group in tl.static_range(1, COLUMNS // GROUP):
            next_s, next_z = RANGES(s_ptr, z_ptr, n, N, at + group * GROUP, K, GROUP, ZERO, EVEN)
            here = plane >= group * (GROUP // 16)
            s, z = tl.where(here, next_s, s), tl.where(here, next_z, z)
    else:
        if SPAN != BLOCK:
            at += plane // LOW * (8 * UNIT)
        if SPAN == ELEMENT:
            at += tl.arange(0, 8)[None, None, :] * UNIT + plane % LOW * 2 + odd
        s, z = RANGES(s_ptr, z_ptr, n, N, at, K, GROUP, ZERO, EVEN)
    return s, z


@triton.jit
def load_weights(
    q_ptr, s_ptr, z_ptr, table_ptr, s, z, n, row_block, N, K, KB, kb, k, SLICE: tl.constexpr,
    DTYPE: tl.constexpr, DECODE: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr,
    SLICES: tl.constexpr, RANGES: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    UNIT: tl.constexpr, FRAGMENT: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr, ROUND: tl.constexpr,
    BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A slice of block column kb, which begins at column k, decoded: `[BN, 16 PLANES]`, columns in the order of
    `arrange`. `s` and `z` are its ranges; with AFTER it is without scale.
    """
    low = load_words(q_ptr, row_block, N, KB, kb, SLICE * (WORDS // 3 + 1) // SLICES, WORDS, BN, EVEN)
    high = load_words(q_ptr, row_block, N, KB, kb, 2, WORDS, BN, EVEN) if WORDS > 2 else low
    s1, z1 = s, z
    if SPAN == ELEMENT:
        s1, z1 = load_ranges(s_ptr, z_ptr, n, N, K, k, 1, PLANES, RANGES, SPAN, GROUP, ZERO, UNIT, EVEN)
    plane = SLICE * PLANES + tl.arange(0, PLANES)[None, :, None]
    even, odd = DECODE(low, high, plane, s, s1, z, z1, table_ptr, K >> 31, DTYPE, BITS, ZERO, AFTER, PTX)
    LOW: tl.constexpr = FRAGMENT // 2
    w = tl.reshape(tl.join(even, odd), (BN, PLANES // LOW, LOW, 8, 2))
    w = tl.reshape(tl.permute(w, (0, 1, 3, 2, 4)), (BN, 16 * PLANES))
    if w.dtype == tl.int16:
        w = w.to(DTYPE, bitcast=True)
    elif ROUND and not AFTER:
        w = round_to_bfloat16(w)
    else:
        w = w.to(DTYPE)
    return w


@triton.jit
def arrange(x, BM: tl.constexpr, PLANES: tl.constexpr, UNIT: tl.constexpr, FRAGMENT: tl.constexpr):
    """Tokens `[16 PLANES, BM]` -> the same, their columns as the instruction wants them of weights that lie by UNIT."""
    if UNIT == FRAGMENT:
        return x
    else:
        x = tl.permute(tl.reshape(x, (PLANES // (UNIT // 2), 8, UNIT // 2, 2, BM)), (0, 2, 1, 3, 4))
        x = tl.reshape(x, (PLANES // (FRAGMENT // 2), FRAGMENT // 2, 8, 2, BM))
        return tl.reshape(tl.permute(x, (0, 2, 1, 3, 4)), (16 * PLANES, BM))


@triton.jit
def finished(acc):
    """`acc`, once the product that makes it is done: no instruction, but a use that Triton waits for.

    The instruction reads registers while the program goes on, and Triton lets one product run into the next turn of
    the loop. The assembler does not know that its registers are still read: it puts the next turn's weights there, and
    products of half-decoded weights come out (seen on an H200 with 128 tokens and more; `ahead_test.py` looks for it).
    """
    return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def load_low_rank(acc, a_ptr, up_ptr, m, n, M, N, RANK: tl.constexpr):
    """`acc + up a^T` with `a = x down^T` `[M, RANK]`, `up` `[N, RANK]`."""
    for start in tl.static_range(0, RANK, 16):
        r = start + tl.arange(0, 16)
        up = tl.load(up_ptr + n[:, None] * RANK + r[None, :], mask=(n < N)[:, None] & (r < RANK)[None, :], other=0.0)
        a = tl.load(a_ptr + m[None, :] * RANK + r[:, None], mask=(m < M)[None, :] & (r < RANK)[:, None], other=0.0)
        if acc.shape[1] < 16:
            acc += tl.sum(up.to(tl.float32)[:, :, None] * a.to(tl.float32)[None, :, :], 1)
        else:
            acc = tl.dot(up, a, acc, input_precision="ieee")
    return acc


@triton.jit
def finish(acc, y_ptr, sx_ptr, zx_ptr, sum_ptr, a_ptr, up_ptr, m, token, n, M, N, SCALED: tl.constexpr,
           SHIFTED: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    """The epilogue of `acc` `[BN, BM]`: zero points and scales of quantized tokens, the low-rank branch, the store.

    Row m of y is of that token.
    """
    inside = (m < M)[None, :] & (n < N)[:, None]
    if SHIFTED:
        zero = tl.load(zx_ptr + token, mask=m < M, other=0).to(tl.float32)
        acc -= tl.load(sum_ptr + n, mask=n < N, other=0.0)[:, None] * zero[None, :]
    if SCALED:
        acc *= tl.load(sx_ptr + token, mask=m < M, other=0.0)[None, :]
    if RANK > 0:
        acc = load_low_rank(acc, a_ptr, up_ptr, m, n, M, N, RANK)
    tl.store(y_ptr + m[None, :] * N + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_parts(acc, part_ptr, ticket_ptr, SPLITS: tl.constexpr):
    """(sum of the tile's parts, whether this program is to finish it): the last to come adds them, in their order.

    `part_ptr`: float32 `[tiles, SPLITS, BN, BM]`. `ticket_ptr`: zeros `[tiles]`, left as zeros.
    """
    BN: tl.constexpr = acc.shape[0]
    BM: tl.constexpr = acc.shape[1]
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    within = (tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]).to(tl.int64)
    at = part_ptr + tile * (SPLITS * BN * BM) + within
    tl.store(at + tl.program_id(2) * (BN * BM), acc)
    tl.debug_barrier()  # all of the part is written before the ticket is drawn
    last = tl.atomic_add(ticket_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        acc = tl.zeros((BN, BM), dtype=tl.float32)
        # others wrote them: not from this processor's cache. Small tiles fly together, large ones have no room to
        if BN * BM <= 4096:
            for i in tl.static_range(SPLITS):
                acc += tl.load(at + i * (BN * BM), cache_modifier=".cg")
        else:
            for _ in range(SPLITS):
                acc += tl.load(at, cache_modifier=".cg")
                at += BN * BM
        tl.store(ticket_ptr + tile, 0)
    return acc, last


@triton.jit
def gemm_fwd_kernel(
    x_ptr,  # [M / copies, K], rows x_row apart
    q_ptr,  # [N / 16, KB, WORDS, 128] int32
    s_ptr,  # [G, N] scales, or scales and zero points: see decode.py
    z_ptr,  # [G, N] zero points, or anything
    table_ptr,  # levels of a codebook, or anything
    sx_ptr,  # [M / copies] scales of the tokens when x is int8, or anything
    zx_ptr,  # [M / copies] their zero points, or anything
    sum_ptr,  # [N] sums of the rows of W, when tokens have zero points, or anything
    a_ptr,  # [M, RANK], or anything
    up_ptr,  # [N, RANK], or anything
    order_ptr,  # rows of y in the order of their experts, in tiles of one expert each, M where there is none
    expert_ptr,  # the expert of each tile
    part_ptr,  # float32, see `add_parts`, or anything
    ticket_ptr,
    y_ptr,  # [M, N]
    M,
    N,
    K,
    KB,
    x_row,
    q_expert,  # from one expert's words to the next one's
    s_expert,
    table_expert,
    sum_expert,
    copies,  # rows of y that one row of x makes
    blocks_per_split,  # a multiple of BLOCKS
    DECODE: tl.constexpr,  # words -> weights, see decode.py
    BITS: tl.constexpr,
    WORDS: tl.constexpr,  # words of a slot
    PLANES: tl.constexpr,  # of a slice
    SLICES: tl.constexpr,  # parts of a block along K that are multiplied one after the other
    RANGES: tl.constexpr,  # scales and zero points of columns, see decode.py
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale
    ZERO: tl.constexpr,  # the constant zero point, None where they are loaded
    UNIT: tl.constexpr,  # neighbours of a row in one thread, as words have them
    FRAGMENT: tl.constexpr,  # as the instruction wants them
    AFTER: tl.constexpr,  # the sums are scaled, not the weights; always where weights are int8
    WHOLE: tl.constexpr,  # sums are multiplied by the scale of the tensor, the first entry of the table
    ASYNC: tl.constexpr,  # the instruction reads registers while the program goes on
    SHIFTED: tl.constexpr,
    RANK: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,  # parts of K
    VECTOR: tl.constexpr,  # multiply and add instead of tensor cores
    PTX: tl.constexpr,  # the target takes inline PTX
    ROUND: tl.constexpr,  # x is float32 and weights are rounded to bfloat16, for the interpreter, which lacks the type
    EVEN: tl.constexpr,  # tiles end where N and K do
    STAGES: tl.constexpr,
    BLOCKS: tl.constexpr,  # block columns at once
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """`y[m, n] = sum_k x[m, k] W[n, k]`, accumulated in float32 (products of int8 in int32, by groups)."""
    COLUMNS: tl.constexpr = 16 * PLANES
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    INTEGER: tl.constexpr = tl.int8 == DTYPE
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    SHARED: tl.constexpr = SLICES > WORDS // 3 + 1  # two slices are of one word
    # slices of a turn that share a range: the power of two in the number of a group's
    EACH: tl.constexpr = min(BLOCKS * SLICES, GROUP // COLUMNS & -(GROUP // COLUMNS)) if SPAN == BLOCK else 1
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    row_block = (tl.program_id(1) * (BN // 16) + tl.arange(0, BN // 16)).to(tl.int64)
    token = m
    if EXPERTS:
        m = tl.load(order_ptr + m).to(tl.int64)
        token = m // copies
        expert = tl.load(expert_ptr + tl.program_id(0)).to(tl.int64)
        q_ptr += expert * q_expert
        s_ptr += expert * s_expert
        z_ptr += expert * s_expert
        table_ptr += expert * table_expert
        sum_ptr += expert * sum_expert

    if VECTOR:  # noqa: SIM108  the two are tensors of different types to Triton
        acc = tl.zeros((BN, 16, BM), dtype=tl.float32)
    else:
        acc = tl.zeros((BN, BM), dtype=tl.float32)
    first = tl.program_id(2) * blocks_per_split
    x_at = x_ptr + token[None, :] * x_row + tl.arange(0, COLUMNS).to(tl.int64)[:, None]
    # the number of stages said here, so that loops without matrix instructions are pipelined as well
    for start in tl.range(first, tl.minimum(first + blocks_per_split, KB), BLOCKS, num_stages=STAGES):
        for i in tl.static_range(BLOCKS * SLICES):  # several a turn, so that the turn itself costs less
            at = (start * SLICES + i) * COLUMNS
            k = at.to(tl.int64)
            if EVEN:
                x = tl.load(x_at + k, mask=(m < M)[None, :], other=0)
            else:
                x = tl.load(x_at + k, mask=(m < M)[None, :] & (k + tl.arange(0, COLUMNS) < K)[:, None], other=0)
            if SHARED and i % 2 == 0:  # before the words, whose layout is then that of both slices
                next_s, next_z = load_ranges(
                    s_ptr, z_ptr, n, N, K, at + COLUMNS, 0, PLANES, RANGES, SPAN, GROUP, ZERO, UNIT, EVEN
                )
            if SHARED and i % 2 == 1:
                s, z = next_s, next_z
            elif i % EACH == 0:
                s, z = load_ranges(s_ptr, z_ptr, n, N, K, at, 0, PLANES, RANGES, SPAN, GROUP, ZERO, UNIT, EVEN)
            w = load_weights(
                q_ptr, s_ptr, z_ptr, table_ptr, s, z, n, row_block, N, K, KB, start + i // SLICES, at, i % SLICES,
                DTYPE, DECODE, BITS, WORDS, PLANES, SLICES, RANGES, SPAN, GROUP, ZERO, UNIT, FRAGMENT, AFTER, PTX,
                ROUND, BN, EVEN,
            )  # fmt: skip
            x = arrange(x, BM, PLANES, UNIT, FRAGMENT)
            if VECTOR:
                w = tl.reshape(w.to(tl.float32), (BN, PLANES, 16, 1))
                acc += tl.sum(w * tl.reshape(x, (1, PLANES, 16, BM)).to(tl.float32), 1)
            elif AFTER:
                if i % EACH == 0:
                    part = tl.dot(w, x, input_precision="ieee", out_dtype=SUM)
                else:
                    part = tl.dot(w, x, part, input_precision="ieee", out_dtype=SUM)
                if ASYNC:
                    part = finished(part)
                if i % EACH == EACH - 1:
                    acc += part.to(tl.float32) * tl.reshape(scale_of(s, DTYPE), (BN, 1))
            else:
                acc = tl.dot(w, x, acc, input_precision="ieee")
                if ASYNC:
                    acc = finished(acc)

    if VECTOR:
        acc = tl.sum(acc, 1)
    last = True
    if SPLITS > 1:
        acc, last = add_parts(acc, part_ptr, ticket_ptr, SPLITS)
    if last:
        if WHOLE:
            acc *= tl.load(table_ptr)
        finish(acc, y_ptr, sx_ptr, zx_ptr, sum_ptr, a_ptr, up_ptr, m, token, n, M, N, INTEGER, SHIFTED, RANK)


@triton.jit
def dequantize_kernel(
    q_ptr, s_ptr, z_ptr, table_ptr, w_ptr, N, K, KB,
    DECODE: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr, SLICES: tl.constexpr,
    RANGES: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, UNIT: tl.constexpr,
    AFTER: tl.constexpr, PTX: tl.constexpr, ROUND: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`W[n, k]` in the type of `w_ptr`: one block of columns, BN rows."""
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    row_block = (tl.program_id(1) * (BN // 16) + tl.arange(0, BN // 16)).to(tl.int64)
    kb = tl.program_id(0)
    for i in tl.static_range(SLICES):
        at = (kb * SLICES + i) * (16 * PLANES)
        s, z = load_ranges(s_ptr, z_ptr, n, N, K, at, 0, PLANES, RANGES, SPAN, GROUP, ZERO, UNIT, EVEN)
        w = load_weights(
            q_ptr, s_ptr, z_ptr, table_ptr, s, z, n, row_block, N, K, KB, kb, at, i,
            w_ptr.dtype.element_ty, DECODE, BITS, WORDS, PLANES, SLICES, RANGES, SPAN, GROUP, ZERO, UNIT, UNIT, AFTER,
            PTX, ROUND, BN, EVEN,
        )  # fmt: skip
        k = at.to(tl.int64) + tl.arange(0, 16 * PLANES)
        to = w_ptr + n[:, None] * K + k[None, :]
        if EVEN:
            tl.store(to, w)
        else:
            tl.store(to, w, mask=(n < N)[:, None] & (k < K)[None, :])
