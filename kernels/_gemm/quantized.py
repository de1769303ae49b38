"""Launching what quantized tokens need: their quantization, the Hadamard transform, and 8-bit products."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import gcd, log2

import torch
import triton
from torch import Tensor

from hf_quant.grids import IntGrid
from hf_quant.hadamard import Hadamard, signs
from hf_quant.kernels._gemm.configs import Config, kind
from hf_quant.kernels._gemm.launch import INTERPRETED, Tokens, dequantize
from hf_quant.kernels._gemm.machine import multiplies_float8
from hf_quant.kernels._gemm.operand import Weight
from hf_quant.kernels._gemm.parts import parts_of
from hf_quant.kernels._gemm.routing import by_expert
from hf_quant.kernels._gemm.scaled import scaled_fwd_kernel
from hf_quant.kernels._gemm.tokens import tokens_fwd_kernel
from hf_quant.spec import Spec

WIDEST = 16384  # values of a row in registers at once; a longer row is read twice


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """A static range: `scale` float32 `[entries]`, `zero` int32 `[entries]` or None; `index` int64 `[M]`, the entry of
    each token where there are several.
    """

    scale: Tensor
    zero: Tensor | None = None
    index: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """A Hadamard transform in blocks of `size`, a power of two, with signs `[K]` or none."""

    size: int
    signs: Tensor | None = None

    @classmethod
    def of(cls, rotation: Hadamard, x_MK: Tensor) -> "Transform | None":
        """A layer's rotation of such an input, None where its order is no power of two or has no room."""
        size = gcd(rotation.size, x_MK.shape[1])
        if size & (size - 1) or not 2 <= size <= WIDEST:
            return None
        return cls(size, None if rotation.seed is None else signs_of(x_MK.shape[1], rotation.seed, x_MK.device))


@cache
def signs_of(width: int, seed: int, device: torch.device) -> Tensor:
    """The signs of a rotation, float32 `[width]`."""
    return signs(width, seed).to(device, torch.float32)


def static_range(tensors: Mapping[str, Tensor], index: Tensor | None = None) -> Range | None:
    """The stored range of a layer's inputs, None when there is none."""
    if "input_scale" not in tensors:
        return None
    return Range(tensors["input_scale"].float(), tensors.get("input_zero_point"), index)


def quantize(x_MK: Tensor, spec: Spec, static: Range | None = None, transform: Transform | None = None) -> Tokens:
    """Tokens onto the grid of `spec`, transformed first; what `runtime.activation.quantize_input` gives.

    Unsigned 8-bit values and zero points are stored less 128. Bytes of float8_e4m3fn come as that type.
    """
    (M, K), grid = x_MK.shape, spec.grid
    integers = isinstance(grid, IntGrid)
    low, high = (grid.low, grid.high) if isinstance(grid, IntGrid) else (-448, 448)
    values = torch.empty(M, K, dtype=torch.int8 if integers else torch.uint8, device=x_MK.device)
    scale = torch.empty(M, dtype=torch.float32, device=x_MK.device)
    zero = torch.empty_like(scale) if spec.zero == "int" else None
    _launch(x_MK, values, scale, zero, (low, high, 128 if high > 127 and integers else 0), static, transform)
    return Tokens(values if integers else values.view(torch.float8_e4m3fn), scale, zero)


def rotate(x_MK: Tensor, transform: Transform) -> Tensor:
    """The transform alone, rounded once to x's type."""
    y_MK = torch.empty(x_MK.shape, dtype=x_MK.dtype, device=x_MK.device)
    _launch(x_MK, y_MK, y_MK, None, (0, 0, 0), None, transform)
    return y_MK


def _launch(
    x_MK: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    grid: tuple[int, int, int],
    static: Range | None,
    transform: Transform | None,
) -> None:
    M, K = x_MK.shape
    if M == 0 or K == 0:
        return
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    rounded = INTERPRETED and x_MK.dtype == torch.bfloat16  # the interpreter has no bfloat16
    x_MK = x_MK.float() if rounded else x_MK
    out = values.float() if rounded and values.dtype == torch.bfloat16 else values
    size = transform.size if transform else min(WIDEST, triton.next_power_of_2(K))
    signs = transform.signs if transform else None
    table = static is not None and static.index is not None
    tokens_fwd_kernel[(M,)](
        x_MK,
        x_MK if signs is None else signs,
        scale if static is None else static.scale,
        scale if static is None or static.zero is None else static.zero,
        static.index if static is not None and static.index is not None else scale,
        out,
        scale,
        scale if zero is None else zero,
        K,
        x_MK.stride(0),
        LOW=grid[0],
        HIGH=grid[1],
        SHIFT=grid[2],
        ZERO=zero is not None,
        STATIC=static is not None,
        TABLE=table,
        CONVERTS=values.dtype == torch.uint8 and not INTERPRETED and multiplies_float8(values.device),
        ONCE=size >= K,
        SIZE=size,
        STEPS=int(log2(size)) if transform else 0,
        SIGNS=signs is not None,
        num_warps=max(1, min(16, size // 512)),
    )
    if out is not values:
        values.copy_(out)


def scaled_matmul(
    x: Tokens,
    W_NK: Tensor,
    scale_GN: Tensor,
    block: int,
    dtype: torch.dtype,
    *,
    row_sums: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    experts: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """`y = x W^T` of 8-bit values, `[M, N]` in `dtype`.

    Args:
        x: int8 or float8_e4m3fn tokens.
        W_NK: canonical bytes of the same type.
        scale_GN: float32, one a block of K and row.
        block: columns that share a scale.
        dtype: of the result.
        row_sums: `[N]` of the dequantized weight, when tokens have zero points.
        low_rank: `a = x down^T` `[M, R]` and `up` `[N, R]`.
        experts: those of each token, as in `launch.matmul`.
        config: instead of the default one.
    """
    copies, count = (1, 1) if experts is None else (experts.shape[1], W_NK.shape[0])
    (N, K), M = (W_NK.shape[-2], W_NK.shape[-1]), x.values.shape[0] * copies
    new = torch.empty if experts is None else torch.zeros  # rows that no expert takes are 0
    y_MN = new(M, N, dtype=dtype, device=W_NK.device)
    if M == 0:
        return y_MN
    if config is None and experts is None and x.zero is None and vendor_multiplies(W_NK, block, dtype, M):
        # in instructions that Triton 3.6 does not reach; see the figures of `float8 W8A8 rows`
        y_MN = torch._scaled_mm(
            x.values, W_NK.T, scale_a=x.scale[:, None], scale_b=scale_GN, out_dtype=dtype, use_fast_accum=False
        )
        return y_MN if low_rank is None else torch.addmm(y_MN, low_rank[0], low_rank[1].T)
    BK = tile_of_k(block, K)
    config = config or eight_bit(-(-M // count), N, K, BK)
    BK = min(BK, config.BK)
    rounded = INTERPRETED and dtype == torch.bfloat16
    if rounded:
        y_MN = y_MN.float()
        low_rank = None if low_rank is None else (low_rank[0].float(), low_rank[1].float())
    tiles = triton.cdiv(K, BK)
    each = triton.cdiv(tiles, config.splits)
    splits = triton.cdiv(tiles, each)
    a, up = low_rank if low_rank is not None else (y_MN, y_MN)
    order = tile = x.scale
    if experts is not None:
        order, tile = by_expert(experts, count, config.BM)
    grid = (triton.cdiv(M, config.BM) if experts is None else len(tile), triton.cdiv(N, config.BN), splits)
    parts, tickets = parts_of(grid, (config.BN, config.BM), W_NK.device) if splits > 1 else (y_MN, y_MN)
    scaled_fwd_kernel[grid](
        x.values,
        W_NK,
        scale_GN,
        x.scale,
        x.scale if x.zero is None else x.zero,
        x.scale if row_sums is None else row_sums,
        a,
        up,
        order,
        tile,
        parts,
        tickets,
        y_MN,
        M,
        N,
        K,
        block,
        each,
        scale_GN.stride(0),
        copies,
        WHOLE=block >= K,
        SHIFTED=x.zero is not None,
        RANK=up.shape[1] if low_rank is not None else 0,
        EXPERTS=experts is not None,
        SPLITS=splits,
        EVEN=N % config.BN == 0 and K % BK == 0,
        BM=config.BM,
        BN=config.BN,
        BK=BK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y_MN.to(dtype) if rounded else y_MN


def vendor_multiplies(W_NK: Tensor, block: int, dtype: torch.dtype, tokens: int) -> bool:
    """Whether torch's own float8 product takes it: one scale a row, bfloat16, Hopper, rows of 16 bytes, many tokens."""
    N, K = W_NK.shape[-2:]
    fits = W_NK.dtype == torch.float8_e4m3fn and block >= K and dtype == torch.bfloat16 and N % 16 == K % 16 == 0
    return fits and W_NK.is_cuda and kind(W_NK.device) == "sm_90" and tokens > 16


def unpacked_matmul(
    x: Tokens,
    blob: list[Tensor],
    weight: Weight,
    dtype: torch.dtype,
    *,
    row_sums: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The same for packed integers: written out as bytes once, for so many tokens that it pays."""
    W_NK = dequantize(blob, weight, torch.int8)
    return scaled_matmul(x, W_NK, blob[1], weight.group, dtype, row_sums=row_sums, low_rank=low_rank)


def tile_of_k(block: int, K: int) -> int:
    """Columns multiplied at once: 128, or what divides the block."""
    return 128 if block >= K else min(128, block & -block)


def eight_bit(M: int, N: int, K: int, BK: int) -> Config:
    """By arithmetic: tiles of 128 where tokens fill them, K in parts where they leave processors idle. Not tuned."""
    BM = next((b for b in (16, 32, 64) if b >= M), 128)
    if M <= 128 and M > 32:  # measured on an H200; larger tiles leave its processors idle
        BM, BN, stages = 64, 64, 4
    else:
        BN, stages = 128, 3
    tiles = triton.cdiv(M, BM) * triton.cdiv(N, BN)
    splits = max(1, min(8, 264 // tiles, triton.cdiv(K, 4 * BK)))
    return Config("tensor", BM=BM, BN=BN, BK=BK, splits=splits, num_warps=4 if BM < 128 else 8, num_stages=stages)
