"""Who is measured: torch, our formats, and other libraries where they are installed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.formats import Layer, choose_kernel, format_named
from hf_quant.grids import E4M3, CodebookGrid, FloatGrid, IntGrid, LevelGrid, MiniFloatGrid
from hf_quant.kernels.bnb_4bit.format import NF4
from hf_quant.qtensor import QTensor
from hf_quant.spec import Spec, act_spec, int_spec

Shape = tuple[int, int]
Make = Callable[[Shape, torch.device, torch.dtype], tuple[Callable[[Tensor], Tensor], int]]
E2M1 = MiniFloatGrid(2, 1)
FLOAT16, FLOAT32 = FloatGrid("float16"), FloatGrid("float32")
FLOAT8_TOKENS = Spec(grid=E4M3, block=(1, -1), index="token", range="dynamic", scale=FLOAT32)


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to multiply by a random weight.

    Attributes:
        name: in the tables.
        make: (shape, device, dtype) -> the product, and the bytes of its weight.
        tokens: numbers of tokens it is measured at; None: all.
    """

    name: str
    make: Make
    tokens: Callable[[int], bool] = lambda _: True


def dense(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    """torch's own linear."""
    W_NK = torch.randn(shape, device=device, dtype=dtype)
    return lambda x: F.linear(x, W_NK), W_NK.numel() * W_NK.element_size()


def ours(format_id: str, weights: Spec, inputs: Spec | None = None, *, kernel: str | None = None) -> Make:
    """One of our formats with random codes, run by the kernel named or the one a layer would choose."""

    def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
        fmt, layer = format_named(format_id), Layer(shape, weights, inputs)
        tensors = fmt.pack(random_weight(shape, weights, device))
        name = kernel or choose_kernel(fmt, layer, device, dtype)[0]
        chosen = next((k for k in fmt.kernels if k.name == name), None)
        blob = chosen.prepare(tensors, layer, dtype) if chosen is not None else []
        codes = [] if name in fmt.replaces else [tensors["qweight"]]
        held = [*codes, *blob] if blob else list(tensors.values())
        return lambda x: fmt.linear(x, tensors, blob, layer, name), sum(t.numel() * t.element_size() for t in held)

    return make


def random_weight(shape: Shape, spec: Spec, device: torch.device) -> QTensor:
    """Codes at random, scales near one step: speed does not depend on values, and rounding a matrix takes long."""
    codes = torch.randint(0, 1 << int(spec.grid.bits), shape, dtype=torch.uint8, device=device)
    if isinstance(spec.grid, CodebookGrid):
        levels = torch.randn(*spec.blocks(shape), 1 << spec.grid.bits, device=device).sort(-1).values
        ones = torch.ones(spec.blocks(shape), device=device)
        return QTensor(codes, ones, None, spec, shape, codebook=spec.scale.decode(spec.scale.encode(levels)))
    if spec.grid == E4M3:
        codes &= 0xF7  # no NaN
    scale = spec.scale.decode(spec.scale.encode(torch.rand(spec.blocks(shape), device=device) * 0.01 + 0.01))
    zero = torch.full_like(scale, 1 << (int(spec.grid.bits) - 1)) if spec.zero != "none" else None
    whole = torch.ones(1, device=device) if spec.tensor_scale else None
    return QTensor(codes, scale, zero, spec, shape, tensor_scale=whole)


def tinygemm(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    """torchao's 4-bit product, which lives in torch: groups of 128."""
    N, K = shape
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(K // 128, N, 2, device=device, dtype=dtype)
    nbytes = packed.numel() * packed.element_size() + scales.numel() * scales.element_size()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales), nbytes


def gemlite(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    """gemlite's A16W4, groups of 128."""
    import gemlite as library

    N, K = shape
    layer = library.GemLiteLinear(
        W_nbits=4,
        group_size=128,
        in_features=K,
        out_features=N,
        input_dtype=getattr(library.DType, "BF16" if dtype == torch.bfloat16 else "FP16"),
        output_dtype=getattr(library.DType, "BF16" if dtype == torch.bfloat16 else "FP16"),
    )
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
    scales, zeros = (torch.rand(N, K // 128, device=device, dtype=dtype) for _ in range(2))
    layer.pack(codes, scales, zeros)
    return lambda x: layer(x), N * K // 2 + 2 * scales.numel() * scales.element_size()


def marlin(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    """Marlin (its own package), 4 bits, groups of 128, symmetric. It multiplies float16 and nothing else."""
    import marlin as library

    N, K = shape
    layer = library.Layer(K, N, 128).to(device)
    layer.B.random_(-(1 << 31), (1 << 31) - 1)
    layer.s.uniform_(0.01, 0.02)
    tokens: dict[int, Tensor] = {}

    def run(x: Tensor) -> Tensor:
        y: Tensor = layer(tokens.setdefault(x.shape[0], x.half()))  # once, before anything is timed
        return y

    return run, N * K // 2 + 2 * layer.s.numel()


def few(tokens: int) -> bool:
    """Where weights are what takes time."""
    return tokens <= 4


def many(tokens: int) -> bool:
    """Where products of 8 bits are worth their name."""
    return tokens >= 1024


E8M0, E4M3_SCALES = FloatGrid("float8_e8m0fnu"), FloatGrid("float8_e4m3fn")
CONTENDERS = (
    Contender("torch", dense),
    Contender("int-group W4 g128", ours("int-group/1", int_spec(4, 128))),
    Contender("int-group W4 g128 symmetric", ours("int-group/1", int_spec(4, 128, symmetric=True))),
    Contender("int-group W3 g128", ours("int-group/1", int_spec(3, 128)), few),
    Contender("int-group W2 g128", ours("int-group/1", int_spec(2, 128)), few),
    Contender("int-group W8 rows", ours("int-group/1", int_spec(8, symmetric=True)), few),
    Contender("lut-group NF4 g64", ours("lut-group/1", Spec(grid=LevelGrid(NF4), block=(1, 64))), few),
    Contender("lut-group MXFP4", ours("lut-group/1", Spec(grid=E2M1, block=(1, 32), scale=E8M0)), few),
    Contender(
        "lut-group NVFP4",
        ours("lut-group/1", Spec(grid=E2M1, block=(1, 16), scale=E4M3_SCALES, tensor_scale=True)),
        few,
    ),
    Contender("codebook-group W4 rows", ours("codebook-group/1", Spec(grid=CodebookGrid(4), scale=FLOAT16)), few),
    Contender("codebook-group W3 rows", ours("codebook-group/1", Spec(grid=CodebookGrid(3), scale=FLOAT16)), few),
    Contender(
        "int-float-zero W4 g128", ours("int-float-zero/1", Spec(grid=IntGrid(4), zero="float", block=(1, 128))), few
    ),
    Contender("int-group W4A8 g256", ours("int-group/1", int_spec(4, 256), act_spec(8)), many),
    Contender("int8-act W8A8", ours("int8-act/1", int_spec(8, symmetric=True), act_spec(8)), many),
    Contender("float8 W8A8 rows", ours("float8/1", Spec(grid=E4M3, scale=FLOAT32), FLOAT8_TOKENS), many),
    Contender(
        "float8 W8A8 128x128", ours("float8/1", Spec(grid=E4M3, block=(128, 128), scale=FLOAT32), FLOAT8_TOKENS), many
    ),
    Contender("tinygemm W4 g128", tinygemm),
    Contender("gemlite W4 g128", gemlite),
    Contender("Marlin W4 g128 float16", marlin),
)
