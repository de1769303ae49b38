"""GPU kernel: unpack, dequantize and multiply in one pass over the weights, any width, group and shape.

First a correct one: every weight reads its own word (neighbours hit the cache), tiles are fixed, nothing is tuned.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_quant.formats import Layer, Tensors


@triton.jit
def int_group_fwd_kernel(
    x_ptr,  # [M, K] contiguous
    q_ptr,  # [N, words] int32
    s_ptr,  # [N or 1, G]
    z_ptr,  # [N or 1, G] uint8, or anything when the offset is fixed
    y_ptr,  # [M, N]
    M,
    N,
    K,
    words,
    group,
    s_row,  # elements from one row's scales to the next row's: G, or 0 when all rows share them
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    OFFSET: tl.constexpr,  # the code of zero when there are no zero points
    ONE_GROUP: tl.constexpr,  # a tile never spans two groups
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`y[m, n] = sum_k x[m, k] (code[n, k] - zero) scale`, accumulated in float32."""
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]  # [BM, 1]
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]  # [BN, 1]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        k = (start + tl.arange(0, BK))[None, :]  # [1, BK]
        x = tl.load(x_ptr + m * K + k, mask=(m < M) & (k < K), other=0.0)

        inside = (n < N) & (k < K)
        word, shift = k * BITS // 32, (k * BITS % 32).to(tl.uint32)
        code = tl.load(q_ptr + n * words + word, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
        if 32 % BITS != 0:  # a code may go on in the next word
            crosses = shift + BITS > 32
            rest = tl.load(q_ptr + n * words + word + 1, mask=inside & crosses, other=0).to(tl.uint32, bitcast=True)
            code = tl.where(crosses, code | (rest << ((32 - shift) & 31)), code)
        value = (code & ((1 << BITS) - 1)).to(tl.float32)  # [BN, BK]

        if ONE_GROUP:
            block = n * s_row + start // group  # [BN, 1]
            held = n < N
        else:
            block = n * s_row + k // group  # [BN, BK]
            held = inside
        if ZEROS:
            value -= tl.load(z_ptr + block, mask=held, other=0).to(tl.float32)
        else:
            value -= OFFSET
        w = value * tl.load(s_ptr + block, mask=held, other=0.0).to(tl.float32)
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="ieee")
    n = tl.trans(n)  # [1, BN]
    tl.store(y_ptr + m * N + n, acc.to(y_ptr.dtype.element_ty), mask=(m < M) & (n < N))


@dataclass(frozen=True, slots=True)
class Tile:
    """One launch configuration."""

    BM: int
    BN: int
    BK: int
    num_warps: int = 4
    num_stages: int = 3


FEW_TOKENS, MANY_TOKENS = Tile(16, 32, 64), Tile(64, 64, 32)


def constants(layer: Layer, tile: Tile) -> dict[str, int | bool]:
    """Compile-time arguments of the kernel."""
    group, grid = layer.weights.block_size(layer.shape)[1], layer.weights.grid
    return {
        "BITS": int(grid.bits),
        "ZEROS": layer.weights.zero == "int",
        "OFFSET": -getattr(grid, "low", 0),
        "ONE_GROUP": group >= layer.shape[1] or group % tile.BK == 0,
        "BM": tile.BM,
        "BN": tile.BN,
        "BK": tile.BK,
    }


def matmul(x_TK: Tensor, tensors: Tensors, zeros: Tensor | None, layer: Layer) -> Tensor:
    """`x W^T`; `zeros` are the unpacked zero points, uint8 `[N or 1, G]`, or None."""
    (N, K), M = layer.shape, x_TK.shape[0]
    x_TK, scale = x_TK.contiguous(), tensors["scale"]
    y_TN = torch.empty(M, N, dtype=x_TK.dtype, device=x_TK.device)
    tile = FEW_TOKENS if M <= 16 else MANY_TOKENS
    if M:
        int_group_fwd_kernel[(triton.cdiv(M, tile.BM), triton.cdiv(N, tile.BN))](
            x_TK,
            tensors["qweight"],
            scale,
            scale if zeros is None else zeros,
            y_TN,
            M,
            N,
            K,
            tensors["qweight"].shape[1],
            layer.weights.block_size(layer.shape)[1],
            scale.shape[1] if scale.shape[0] > 1 else 0,
            **constants(layer, tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
    return y_TN
