"""The main loop: `y^T = W x^T`, the weight decoded in registers on its way from memory to the tensor cores.

The product is transposed because the left operand may come from registers on every machine: what a thread loads is
then what it multiplies, and no decoded weight passes through shared memory. README.md has the layout.
"""

import triton
import triton.language as tl

# How many columns share a scale, as a block of the shuffled layout sees it.
WHOLE_ROW, BLOCK, PLANE, ELEMENT = (tl.constexpr(i) for i in range(4))


@triton.jit
def round_to_bfloat16(x):
    """float32 -> the nearest bfloat16, ties to even, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_words(q_ptr, block, inside, BN: tl.constexpr, WORDS: tl.constexpr, J: tl.constexpr):
    """Word J of every slot of some blocks: `[BN / 16]` block numbers -> `[BN, 1, 8]`. A reshape, no data moves."""
    at = (block * WORDS + J) * 128
    w = tl.load(q_ptr + at[:, None] + tl.arange(0, 128)[None, :], mask=inside[:, None], other=0)
    w = tl.reshape(w, (BN // 16, 8, 4, 2, 2))  # g, t, k half, row half
    w = tl.permute(w, (0, 4, 1, 3, 2))
    return tl.reshape(w, (BN, 1, 8))


@triton.jit
def load_weights(
    q_ptr, s_ptr, z_ptr, table_ptr, s, z, n, row_block, N, K, KB, kb, group,
    DTYPE: tl.constexpr, DECODE: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr,
    RANGES: tl.constexpr, SPAN: tl.constexpr, ZERO: tl.constexpr, UNIT: tl.constexpr, PTX: tl.constexpr,
    ROUND: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Block column kb, decoded: `[BN, 16 PLANES]`, columns in order; and its scales. `s` and `z` are those of whole
    rows, used when there is one each.
    """
    block, inside = row_block * KB + kb, row_block * 16 < N
    w0 = load_words(q_ptr, block, inside, BN, WORDS, 0)
    w1 = load_words(q_ptr, block, inside, BN, WORDS, 1) if WORDS > 1 else w0
    w2 = load_words(q_ptr, block, inside, BN, WORDS, 2) if WORDS > 2 else w0
    plane = tl.arange(0, PLANES)[None, :, None]
    LOW: tl.constexpr = UNIT // 2  # planes whose pairs are neighbours
    if SPAN != WHOLE_ROW:
        at = kb * (16 * PLANES) + tl.zeros((1, 1, 1), tl.int32)
        if SPAN != BLOCK:
            at += plane // LOW * (8 * UNIT)
        if SPAN == ELEMENT:
            at += tl.arange(0, 8)[None, None, :] * UNIT + plane % LOW * 2
        s, z = RANGES(s_ptr, z_ptr, n, N, at, K, group, ZERO)
    s1, z1 = s, z
    if SPAN == ELEMENT:
        s1, z1 = RANGES(s_ptr, z_ptr, n, N, at + 1, K, group, ZERO)
    even, odd = DECODE(w0, w1, w2, plane, s, s1, z, z1, table_ptr, DTYPE, BITS, PTX)
    w = tl.reshape(tl.join(even, odd), (BN, PLANES // LOW, LOW, 8, 2))
    w = tl.reshape(tl.permute(w, (0, 1, 3, 2, 4)), (BN, 16 * PLANES))
    if w.dtype == tl.int16:
        w = w.to(DTYPE, bitcast=True)
    elif ROUND:
        w = round_to_bfloat16(w)
    else:
        w = w.to(DTYPE)
    return w, s


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
    y_ptr,  # [M, N], or float32 [splits, M, N]
    M,
    N,
    K,
    KB,
    group,
    x_row,
    q_expert,  # from one expert's words to the next one's
    s_expert,
    table_expert,
    sum_expert,
    copies,  # rows of y that one row of x makes
    blocks_per_split,
    DECODE: tl.constexpr,  # words -> weights, see decode.py
    BITS: tl.constexpr,
    WORDS: tl.constexpr,  # words of a slot
    PLANES: tl.constexpr,
    RANGES: tl.constexpr,  # scales and zero points of columns, see decode.py
    SPAN: tl.constexpr,
    ZERO: tl.constexpr,  # the constant zero point where none are loaded
    UNIT: tl.constexpr,  # neighbours of a row in one register
    SHIFTED: tl.constexpr,
    RANK: tl.constexpr,
    EXPERTS: tl.constexpr,
    PARTIAL: tl.constexpr,  # y gets sums without an epilogue
    VECTOR: tl.constexpr,  # multiply and add instead of tensor cores
    PTX: tl.constexpr,  # the target takes inline PTX
    ROUND: tl.constexpr,  # x is float32 and weights are rounded to bfloat16, for the interpreter, which lacks the type
    STAGES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """`y[m, n] = sum_k x[m, k] W[n, k]`, accumulated in float32 (groups of int8 products in int32)."""
    COLUMNS: tl.constexpr = 16 * PLANES
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    INTEGER: tl.constexpr = tl.int8 == DTYPE
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

    s, z = 0, 0
    if SPAN == WHOLE_ROW:
        s, z = RANGES(s_ptr, z_ptr, n, N, tl.zeros((1, 1, 1), tl.int32), K, group, ZERO)
    if VECTOR:  # noqa: SIM108  the two are tensors of different types to Triton
        acc = tl.zeros((BN, 16, BM), dtype=tl.float32)
    else:
        acc = tl.zeros((BN, BM), dtype=tl.float32)
    first = tl.program_id(2) * blocks_per_split
    # the number of stages said here, so that loops without matrix instructions are pipelined as well
    for kb in tl.range(first, tl.minimum(first + blocks_per_split, KB), num_stages=STAGES):
        k = (kb * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        x = tl.load(x_ptr + token[None, :] * x_row + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0)
        w, s_block = load_weights(
            q_ptr, s_ptr, z_ptr, table_ptr, s, z, n, row_block, N, K, KB, kb, group,
            DTYPE, DECODE, BITS, WORDS, PLANES, RANGES, SPAN, ZERO, UNIT, PTX, ROUND, BN,
        )  # fmt: skip
        if VECTOR:
            w = tl.reshape(w.to(tl.float32), (BN, PLANES, 16, 1))
            acc += tl.sum(w * tl.reshape(x, (1, PLANES, 16, BM)).to(tl.float32), 1)
        elif INTEGER:
            acc += tl.dot(w, x).to(tl.float32) * tl.reshape(s_block, (BN, 1))
        else:
            acc = tl.dot(w, x, acc, input_precision="ieee")

    if VECTOR:
        acc = tl.sum(acc, 1)
    if PARTIAL:
        y_ptr += tl.program_id(2).to(tl.int64) * M * N
        tl.store(y_ptr + m[None, :] * N + n[:, None], acc, mask=(m < M)[None, :] & (n < N)[:, None])
    else:
        finish(acc, y_ptr, sx_ptr, zx_ptr, sum_ptr, a_ptr, up_ptr, m, token, n, M, N, INTEGER, SHIFTED, RANK)


@triton.jit
def combine_fwd_kernel(
    partial_ptr, sx_ptr, zx_ptr, sum_ptr, a_ptr, up_ptr, y_ptr, M, N, splits,
    SCALED: tl.constexpr, SHIFTED: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sum the splits of K, always in the same order, and finish."""
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    at = m[None, :] * N + n[:, None]
    inside = (m < M)[None, :] & (n < N)[:, None]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    step = (tl.zeros((1, 1), tl.int64) + M) * N
    part = at
    for _ in range(splits):
        acc += tl.load(partial_ptr + part, mask=inside, other=0.0)
        part += step
    finish(acc, y_ptr, sx_ptr, zx_ptr, sum_ptr, a_ptr, up_ptr, m, m, n, M, N, SCALED, SHIFTED, RANK)


@triton.jit
def dequantize_kernel(
    q_ptr, s_ptr, z_ptr, table_ptr, w_ptr, N, K, KB, group,
    DECODE: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr, RANGES: tl.constexpr,
    SPAN: tl.constexpr, ZERO: tl.constexpr, UNIT: tl.constexpr, PTX: tl.constexpr, ROUND: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """`W[n, k]` in the type of `w_ptr`: one block of columns, BN rows."""
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    row_block = (tl.program_id(1) * (BN // 16) + tl.arange(0, BN // 16)).to(tl.int64)
    kb = tl.program_id(0)
    s, z = 0, 0
    if SPAN == WHOLE_ROW:
        s, z = RANGES(s_ptr, z_ptr, n, N, tl.zeros((1, 1, 1), tl.int32), K, group, ZERO)
    w, _ = load_weights(
        q_ptr, s_ptr, z_ptr, table_ptr, s, z, n, row_block, N, K, KB, kb, group,
        w_ptr.dtype.element_ty, DECODE, BITS, WORDS, PLANES, RANGES, SPAN, ZERO, UNIT, PTX, ROUND, BN,
    )  # fmt: skip
    k = (kb * (16 * PLANES) + tl.arange(0, 16 * PLANES)).to(tl.int64)
    tl.store(w_ptr + n[:, None] * K + k[None, :], w, mask=(n < N)[:, None] & (k < K)[None, :])
