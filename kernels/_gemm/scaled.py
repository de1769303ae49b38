"""Products of 8-bit operands: integers, or floats where the machine multiplies them. The bytes as they are saved."""

import triton
import triton.language as tl

from hf_quant.kernels._gemm.loop import add_parts, finish


@triton.jit
def scaled_fwd_kernel(
    x_ptr,  # [M / copies, K] int8 or float8
    w_ptr,  # [N, K] of the same type
    sw_ptr,  # float32 [kb, N]: scales of W, by blocks of K
    sx_ptr,  # float32 [M / copies]
    zx_ptr,  # float32 [M / copies], or anything
    sum_ptr,  # float32 [N], or anything
    a_ptr,
    up_ptr,
    order_ptr,  # rows of y by expert, and the expert of each tile, as in loop.py
    expert_ptr,
    part_ptr,  # see loop.add_parts, or anything
    ticket_ptr,
    y_ptr,  # [M, N]
    M,
    N,
    K,
    block,  # columns that share a scale, a multiple of BK, or all
    tiles_per_split,
    sw_expert,  # scales of W from one expert's to the next one's
    copies,  # rows of y that one row of x makes
    WHOLE: tl.constexpr,  # one scale a row: it waits for the end
    SHIFTED: tl.constexpr,
    RANK: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,  # tiles end where N and K do
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`y[m, n] = sx[m] (sum_k x[m, k] w[n, k] sw[k, n] - zx[m] sum[n])`.

    Sums of integers are exact in int32. float8 tensor cores keep fewer bits than float32 while they add, so they add a
    tile of BK and no more.
    """
    INTEGER: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    token = m
    if EXPERTS:
        m = tl.load(order_ptr + m).to(tl.int64)
        token = m // copies
        expert = tl.load(expert_ptr + tl.program_id(0)).to(tl.int64)
        w_ptr += expert * N * K
        sw_ptr += expert * sw_expert
        sum_ptr += expert * N
    acc = tl.zeros((BN, BM), dtype=tl.int32 if INTEGER and WHOLE else tl.float32)
    first = tl.program_id(2) * tiles_per_split
    k = (first * BK + tl.arange(0, BK)).to(tl.int64)
    x_at = x_ptr + token[None, :] * K + k[:, None]
    w_at = w_ptr + n[:, None] * K + k[None, :]
    step = tl.full((1, 1), BK, tl.int64)
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(K, BK))):
        if EVEN:
            x = tl.load(x_at, mask=(m < M)[None, :], other=0.0)
            w = tl.load(w_at)
        else:
            inside = tile * BK + tl.arange(0, BK) < K
            x = tl.load(x_at, mask=(m < M)[None, :] & inside[:, None], other=0.0)
            w = tl.load(w_at, mask=(n < N)[:, None] & inside[None, :], other=0.0)
        x_at += step
        w_at += step
        if WHOLE and INTEGER:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        elif WHOLE:
            acc += tl.dot(w, x)
        else:
            at = (tile * BK // block).to(tl.int64) * N + n
            acc += tl.dot(w, x).to(tl.float32) * tl.load(sw_ptr + at, mask=n < N, other=0.0)[:, None]
    if WHOLE:
        acc = acc.to(tl.float32) * tl.load(sw_ptr + n, mask=n < N, other=0.0)[:, None]
    last = True
    if SPLITS > 1:
        acc, last = add_parts(acc, part_ptr, ticket_ptr, SPLITS)
    if last:
        finish(acc, y_ptr, sx_ptr, zx_ptr, sum_ptr, a_ptr, up_ptr, m, token, n, M, N, True, SHIFTED, RANK)
