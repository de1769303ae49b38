"""Launching the main loop: from a packed weight and tokens to the product."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from hf_quant.kernels._gemm import decode, loop
from hf_quant.kernels._gemm.configs import Config, bucket, choose, fitted, kind
from hf_quant.kernels._gemm.operand import BLOCK, WHOLE_ROW, Weight
from hf_quant.kernels._gemm.parts import parts_of
from hf_quant.kernels._gemm.routing import by_expert

WRITING = Config("dense", BN=64, BK=0)  # the tile that is written where nothing is multiplied
INTERPRETED = not isinstance(loop.gemm_fwd_kernel, triton.JITFunction)
BACKEND = "interpreter" if INTERPRETED else "hip" if torch.version.hip else "cuda"


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Tokens as integers: `x = (values - zero) scale`.

    Attributes:
        values: int8 `[M, K]`.
        scale: float32 `[M]`.
        zero: float32 `[M]`, with `row_sums` of the weight, or None.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None = None


def matmul(
    x: Tensor | Tokens,
    blob: list[Tensor],
    weight: Weight,
    dtype: torch.dtype,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    row_sums: Tensor | None = None,
    experts: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """`y = x W^T (+ a up^T)`, `[M, N]` in `dtype`.

    Args:
        x: `[M, K]`, or its integers.
        blob: words `[N / 16, KB, words, 128]`, one or two range tensors `[G, N]`, a table of levels if there is one.
        weight: what the blob is.
        dtype: of the result.
        low_rank: `a = x down^T` `[M, R]` and `up` `[N, R]`.
        row_sums: `[N]`, when tokens have zero points.
        experts: those of each token, `[M, copies]`, see `by_expert`; y has `M copies` rows, the blob's tensors (and
            `row_sums`) a first dimension more.
        config: instead of the chosen one.
    """
    values = x.values if isinstance(x, Tokens) else x
    copies, count = (1, 1) if experts is None else (experts.shape[1], blob[0].shape[0])
    (N, K), M = weight.shape, values.shape[0] * copies
    if M == 0:
        return torch.empty(0, N, dtype=dtype, device=values.device)
    config = config or choose(weight, values.dtype, bucket(-(-M // count)), values.device)
    if isinstance(x, Tokens) or experts is not None:
        config = only_tensor(config, weight, values)
    if config.way == "dense":
        assert isinstance(x, Tensor)  # noqa: S101  `only_tensor`
        y_MN = F.linear(x, dequantize(blob, weight, dtype))
        return y_MN if low_rank is None else torch.addmm(y_MN, low_rank[0], low_rank[1].T)

    values = values if values.stride(1) == 1 else values.contiguous()
    weight, whole = whole_last(weight, config)
    rounded = INTERPRETED and dtype == torch.bfloat16  # the interpreter has no bfloat16
    if rounded and values.dtype == dtype:
        values = values.float()
    a, up = low_rank if low_rank is not None else (values, values)
    if rounded and low_rank is not None:
        a, up = a.float(), up.float()
    rank = up.shape[1] if low_rank is not None else 0
    words, first, second, table = operands(blob, weight)
    at_once, along = config.blocks(weight, values.dtype.itemsize), weight.shuffle.blocks(weight.shape)[1]
    steps = triton.cdiv(along, at_once)
    each = triton.cdiv(steps, config.splits)
    splits = triton.cdiv(steps, each)
    order = tile = words
    if experts is not None:
        order, tile = by_expert(experts, count, config.BM)
    new = torch.empty if experts is None else torch.zeros  # rows that no expert takes are 0
    y_MN = new(M, N, dtype=torch.float32 if rounded else dtype, device=values.device)
    scale = x.scale if isinstance(x, Tokens) else values
    zero = x.zero if isinstance(x, Tokens) and x.zero is not None else None
    grid = (triton.cdiv(M, config.BM) if experts is None else len(tile), triton.cdiv(N, config.BN), splits)
    parts, tickets = parts_of(grid, (config.BN, config.BM), values.device) if splits > 1 else (y_MN, y_MN)
    loop.gemm_fwd_kernel[grid](
        values,
        words,
        first,
        second,
        table,
        scale,
        scale if zero is None else zero,
        scale if row_sums is None else row_sums,
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
        along,
        values.stride(0),
        *(t.stride(0) for t in (words, first, table)),
        0 if row_sums is None else row_sums.stride(0),
        copies,
        each * at_once,
        **constants(weight, values.dtype, config, kind(values.device)),
        BLOCKS=at_once,
        **instruction(config, weight, values.dtype, kind(values.device)),
        WHOLE=whole,
        SHIFTED=zero is not None,
        RANK=rank,
        EXPERTS=experts is not None,
        SPLITS=splits,
        VECTOR=config.way == "vector",
        ROUND=rounded and values.dtype == torch.float32,
        STAGES=config.num_stages,
        BM=config.BM,
        BN=config.BN,
        **compiled_with(config, kind(values.device)),
    )
    return y_MN.to(dtype) if rounded else y_MN


def dequantize(blob: list[Tensor], weight: Weight, dtype: torch.dtype) -> Tensor:
    """`W_NK` in `dtype`: the bits of the reference."""
    N, K = weight.shape
    words, first, second, table = operands(blob, weight)
    rounded = INTERPRETED and dtype == torch.bfloat16
    W_NK = torch.empty(N, K, dtype=torch.float32 if rounded else dtype, device=words.device)
    BN, along, fixed = WRITING.BN, weight.shuffle.blocks(weight.shape)[1], constants(weight, dtype, WRITING, "")
    loop.dequantize_kernel[(along, triton.cdiv(N, BN))](
        words, first, second, table, W_NK, N, K, along, **fixed, ROUND=rounded, BN=BN
    )
    return W_NK.to(dtype) if rounded else W_NK


def constants(
    weight: Weight, dtype: torch.dtype, config: Config, target: str, backend: str | None = None
) -> dict[str, object]:
    """What the kernels are compiled for, as far as the weight, the type of the tokens and the tile decide it."""
    shuffle, (N, K), blocks = weight.shuffle, weight.shape, config.blocks(weight, dtype.itemsize)
    summed = config.way == "tensor" and target.startswith(("sm_8", "sm_9", "sm_12"))  # by instructions, in registers
    after = weight.slice(config.BM, blocks * shuffle.columns) if summed else None
    columns, whole = after or shuffle.slice, weight.span == WHOLE_ROW
    return {
        "DECODE": getattr(decode, weight.decode),
        "BITS": weight.bits,
        "WORDS": shuffle.words,
        "PLANES": columns // 16,
        "SLICES": shuffle.columns // columns,
        "RANGES": getattr(decode, weight.ranges),
        "SPAN": BLOCK if whole or after else weight.span,
        "GROUP": 1 << 28 if whole else weight.group,  # four of them are an int32
        "ZERO": weight.zero,
        "UNIT": weight.unit,
        "AFTER": after is not None or dtype == torch.int8,
        "PTX": weight.ptx(dtype, backend or BACKEND, after=after is not None),
        "EVEN": N % config.BN == 0 and K % (blocks * shuffle.columns) == 0,
    }


def whole_last(weight: Weight, config: Config) -> tuple[Weight, bool]:
    """(the weight without the scale of the tensor, whether it had one that may multiply the sums): NVFP4.

    The products of its numbers and scales are numbers of 16 bits, so nothing is rounded before.
    """
    last = weight.decode == "float4" and weight.ranges == "small_floats" and config.way == "tensor"
    return (replace(weight, decode="mxfp4"), True) if last else (weight, False)


def instruction(config: Config, weight: Weight, dtype: torch.dtype, target: str) -> dict[str, object]:
    """What a tile's matrix instruction asks of the loop.

    On Hopper, Triton gives tiles of 64 rows and 4 warps wgmma, which reads registers while the program goes on, and
    smaller tiles mma.sync, which wants four neighbours of a row in a thread, as on Ampere.
    """
    hopper = target == "sm_90" and dtype.itemsize == 2 and config.way == "tensor"
    small = config.BN < 64 or config.num_warps % 4 != 0
    return {"FRAGMENT": 4 if hopper and small else weight.unit, "ASYNC": hopper and not small}


def compiled_with(config: Config, target: str) -> dict[str, int]:
    """What a tile asks of the compiler.

    Without a number of registers NVIDIA's assembler spills to have room for more programs: on Blackwell, and large
    tiles on Ampere. Hopper's were measured without.
    """
    fixed = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    spills = target.startswith("sm_1") or (target.startswith("sm_8") and config.num_warps == 8)
    return fixed | {"maxnreg": 255} if spills and BACKEND == "cuda" else fixed


def operands(blob: list[Tensor], weight: Weight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(words, scales, zero points, table); what there is none of is another tensor that nobody reads."""
    words, first, *rest = blob
    second = rest.pop(0) if weight.ranges == "scales_and_zeros" else first
    return words, first, second, rest[0] if rest else first


def only_tensor(config: Config, weight: Weight, values: Tensor) -> Config:
    """For products that have neither a vector nor a dense way."""
    if config.way == "dense":
        return fitted(Config("tensor", BM=64), weight, values.dtype, values.device)
    return replace(config, way="tensor", BM=max(16, config.BM))
