"""Layers to try a format on, and what it must compute there, from the definitions alone: slow, in float64.

Shapes: `W_NK` a weight, `x_TK` tokens, `y_TN = q(x) W^T`.
"""

from collections.abc import Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor

from hf_quant.formats import Layer, PackedFormat
from hf_quant.grids import (
    E4M3,
    E5M2,
    CodebookGrid,
    FloatGrid,
    GaussianGrid,
    IntGrid,
    LevelGrid,
    MiniFloatGrid,
    TableGrid,
)
from hf_quant.hadamard import Hadamard
from hf_quant.qtensor import QTensor, from_extremes
from hf_quant.runtime.activation import pack_input
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec, act_spec, int_spec

E2M1 = MiniFloatGrid(2, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (63, 100), (16, 64), (48, 192), (5, 33), (100, 63), (32, 128), (8, 256), (7, 64))
WEIGHTS = (
    *(int_spec(b, g, symmetric=s) for b in range(1, 9) for g in (-1, 7, 32, 50, 64) for s in (False, True)),
    *(Spec(grid=IntGrid(b, signed=True), zero="float", block=(1, 16)) for b in (4, 5, 8)),
    *(Spec(grid=IntGrid(b, signed=True), zero="int", block=(1, 16), scale=FloatGrid("float32")) for b in (2, 4)),
    *(Spec(grid=IntGrid(b, signed=True), block=block) for b in (4, 8) for block in ((-1, -1), (-1, 32))),
    int_spec(8, symmetric=True, scale="float32"),
    int_spec(4, 32, scale="float16"),
    *(Spec(grid=IntGrid(b), zero="float", block=(1, g)) for b, g in ((2, 16), (3, 32), (4, -1), (8, 50))),
    Spec(grid=LevelGrid((-1.0, -0.25, 0.0, 0.5, 1.0)), block=(1, 64)),
    Spec(grid=LevelGrid((-2.0, 0.0, 1.0)), block=(-1, 32)),
    *(Spec(grid=MiniFloatGrid(e, m), block=(1, 32)) for e in range(1, 7) for m in range(7 - e)),
    *(Spec(grid=g, block=(1, 32), scale=FloatGrid("float8_e8m0fnu")) for g in (E2M1, MiniFloatGrid(2, 3), E4M3, E5M2)),
    *(Spec(grid=E2M1, block=(1, 16), scale=FloatGrid("float8_e4m3fn"), tensor_scale=t) for t in (False, True)),
    *(Spec(grid=E4M3, block=b, scale=FloatGrid("float32")) for b in ((1, -1), (-1, -1), (128, 128), (16, 32))),
    *(Spec(grid=E5M2, block=b) for b in ((1, -1), (-1, -1), (1, 64))),
    *(
        Spec(grid=GaussianGrid(n, p), block=(1, b), scale=FloatGrid("float16"), rotation=r)
        for n, p in ((16, 1), (16, 2), (256, 2), (256, 4))
        for b, r in ((-1, None), (32, Hadamard(32, 0)), (64, Hadamard(1024, 5)))
    ),
    Spec(grid=E2M1, block=(1, 16), scale=FloatGrid("float8_e4m3fn"), tensor_scale=True, rotation=Hadamard(16, 0)),
    *(
        Spec(grid=CodebookGrid(b), block=block, scale=FloatGrid(s))
        for b, block, s in (
            *((b, (1, -1), "float16") for b in range(1, 9)),
            *((3, block, "bfloat16") for block in ((1, 32), (-1, 32), (4, 16), (-1, -1))),
            (4, (1, 50), "float32"),
        )
    ),
)
INPUTS = (
    None,
    act_spec(8),
    act_spec(4, symmetric=False),
    act_spec(8, static=True),
    act_spec(8, static=True, symmetric=False),
    Spec(grid=E4M3, scale=FloatGrid("float32"), index="token", range="dynamic"),
    Spec(grid=E4M3, scale=FloatGrid("float32"), block=(-1, -1)),
    Spec(grid=E2M1, block=(1, 32), index="token", scale=FloatGrid("float8_e8m0fnu"), range="dynamic"),
)


def layers_with(weights: Sequence[Spec]) -> list[Layer]:
    """Layers of all sample shapes and inputs with these weights."""
    return [Layer(shape, spec, inputs) for shape, spec, inputs in product(SHAPES, weights, INPUTS)]


@cache
def every_layer() -> list[Layer]:
    """Integers, floats, levels, tables and codebooks; ragged shapes; static, dynamic and float inputs."""
    return layers_with(WEIGHTS)


def sample_layers(fmt: PackedFormat) -> list[Layer]:
    """Those that the format stores; add your own where it stores what no other does."""
    return [layer for layer in every_layer() if fmt.holds(layer) is None]


def make(layer: Layer, seed: int) -> tuple[QTensor, Tensor]:
    """A random quantized weight, and float32 tokens that go with it."""
    generator = torch.Generator().manual_seed(seed)
    W_NK = torch.randn(layer.shape, generator=generator)
    q = refit(W_NK, layer.weights)
    x_TK = torch.randn(9, layer.shape[1], generator=generator)
    x_TK[0, 0] = 9.0  # some formats treat large inputs apart
    return q, x_TK


def input_range(layer: Layer, x_TK: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """A static range that cuts some tokens off, or None when the layer needs none."""
    if layer.inputs is None or layer.inputs.range == "dynamic":
        return None
    return from_extremes(x_TK.amin(), x_TK.amax() * 0.8, layer.inputs)


def tensors_of(fmt: PackedFormat, layer: Layer, q: QTensor, x_TK: Tensor) -> dict[str, Tensor]:
    """All canonical tensors of the layer."""
    static = input_range(layer, x_TK)
    return fmt.pack(q) | ({} if static is None else pack_input(*static))


def slow_linear(fmt: PackedFormat, x_TK: Tensor, q: QTensor, layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
    """`q(x) W^T` in float64, from the definitions alone (of the format, where it rounds inputs in its own way)."""
    x = x_TK.double()
    if type(fmt).round_input is not PackedFormat.round_input:
        x = fmt.round_input(x_TK.float(), tensors, layer).double()
    elif layer.inputs is not None:
        x = slow_input(x_TK, layer.inputs, tensors)
    return x @ slow_weight(q).T


def slow_input(x_TK: Tensor, spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """The input on its grid: every value by a search of the whole grid, scales by group of columns."""
    columns = spec.block_size((1, x_TK.shape[1]))[1]
    grid, done = spec.grid, []
    for part in x_TK.float().split(columns, 1):
        scale, zero = from_extremes(part.amin(1, keepdim=True), part.amax(1, keepdim=True), spec)
        if spec.range == "static":
            scale, zero = tensors["input_scale"], tensors.get("input_zero_point")
        zero = torch.zeros(1) if zero is None else zero
        steps = part / scale + zero
        if isinstance(grid, IntGrid):
            steps = steps.round().clamp(grid.low, grid.high)
        else:
            assert isinstance(grid, MiniFloatGrid)
            values = grid.table()[:, 0]
            values = values[values.isfinite()].unique()
            # a tie goes to the value with the even pattern, which is the one at an even place from zero
            even = (torch.arange(len(values)) - len(values) // 2) % 2 == 0
            away = (steps.double()[..., None] - values).abs() + torch.where(even, 0, 1e-12)
            steps = values[away.argmin(-1)]
        done.append((steps - zero).double() * scale.double())
    return torch.cat(done, 1)


def slow_weight(q: QTensor) -> Tensor:
    """The weight in float64, value by value."""
    codes, (rows, columns) = q.codes.long(), q.spec.block_size(q.shape)
    n, k = torch.arange(q.shape[0])[:, None] // rows, torch.arange(q.shape[1]) // columns
    if q.codebook is not None:
        values = q.codebook.double()[n, k, codes]
    elif isinstance(q.spec.grid, TableGrid):
        values = q.spec.grid.table().double()[codes].flatten(1)
    else:
        values = q.spec.grid.decode(q.codes).double()
    values = values if q.zero is None else values - q.zero.double()[n, k]
    values = values * q.scale.double()[n, k] * (1.0 if q.tensor_scale is None else q.tensor_scale.double())
    if q.spec.rotation is not None:  # its matrix is orthogonal, so the inverse is the transpose
        values = values @ q.spec.rotation.apply(torch.eye(q.shape[1])).T.double()
    return values


def close(y: Tensor, expected: Tensor, x_TK: Tensor, q: QTensor, sums: float = 2**-24) -> None:
    """Equal up to roundings of x's type: of each factor, at random, of each output and of scales, all the same way.

    Rounding both factors gives an error of standard deviation 0.8 u sqrt(sum (x w)^2); 6 u is beyond 7 of these.
    Sums are kept in float32 (`sums`: half a unit of what keeps them), whose roundings matter when x is float32.
    """
    u, tiny = torch.finfo(x_TK.dtype).eps / 2, torch.finfo(x_TK.dtype).tiny
    size = (x_TK.double().square() @ q.dequantize().double().square().T).sqrt()
    bound = (6 * u + 3 * sums * x_TK.shape[1] ** 0.5) * size + 2 * u * expected.abs() + tiny
    worst = ((y.double() - expected).abs() / bound).max().item() if y.numel() else 0.0
    assert worst <= 1, f"{worst:.3g} times the bound"
