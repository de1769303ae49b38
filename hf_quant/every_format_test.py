"""What every packed format owes, checked on every registered one. Being found by `formats()` means being covered."""

from collections.abc import Iterator
from functools import cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.formats import Kernel, Layer, PackedFormat, choose_kernel, format_for, format_named, formats
from hf_quant.grids import FloatGrid, IntGrid, LevelGrid
from hf_quant.kernels.bnb_4bit.format import FP4, NF4
from hf_quant.ledger import site_bits
from hf_quant.qtensor import QTensor, as_blocks, expand, from_extremes, nearest
from hf_quant.runtime.activation import pack_input
from hf_quant.runtime.linear import QuantLinear
from hf_quant.spec import Spec, act_spec, int_spec

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (63, 100), (16, 64), (48, 192), (5, 33), (100, 63), (32, 128), (8, 256), (7, 64))
WEIGHTS = (
    *(int_spec(b, g, symmetric=s) for b in range(1, 9) for g in (-1, 7, 32, 50, 64) for s in (False, True)),
    *(Spec(grid=IntGrid(b, signed=True), zero="int", block=(1, 16), scale=FloatGrid("float32")) for b in (2, 4)),
    *(Spec(grid=IntGrid(b, signed=True), block=block) for b in (4, 8) for block in ((-1, -1), (-1, 32))),
    int_spec(8, symmetric=True, scale="float32"),
    int_spec(4, 32, scale="float16"),
    Spec(grid=LevelGrid((-1.0, -0.25, 0.0, 0.5, 1.0)), block=(1, 64)),
    *(
        Spec(grid=LevelGrid(x), block=(1, b), scale=FloatGrid("float32"))
        for x in (NF4, sorted({*FP4}))
        for b in (32, 64)
    ),
)
INPUTS = (
    None,
    act_spec(8),
    act_spec(4, symmetric=False),
    act_spec(8, static=True),
    act_spec(8, static=True, symmetric=False),
)


LAYERS = [Layer(shape, weights, inputs) for shape, weights, inputs in product(SHAPES, WEIGHTS, INPUTS)]


@cache
def held(format_id: str) -> list[Layer]:
    """Every sample layer the format stores."""
    return [layer for layer in LAYERS if format_named(format_id).holds(layer) is None]


def make(layer: Layer, seed: int) -> tuple[QTensor, Tensor]:
    """A random quantized weight, and float32 tokens that go with it."""
    generator = torch.Generator().manual_seed(seed)
    W_NK = torch.randn(layer.shape, generator=generator)
    blocks = as_blocks(W_NK, layer.weights)
    q = nearest(W_NK, *from_extremes(blocks.amin(-1), blocks.amax(-1), layer.weights), layer.weights)
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
    elif (spec := layer.inputs) is not None:
        low, high = x_TK.float().amin(1, keepdim=True), x_TK.float().amax(1, keepdim=True)
        scale, zero = from_extremes(low, high, spec)
        if spec.range == "static":
            scale, zero = tensors["input_scale"], tensors.get("input_zero_point")
        zero = torch.zeros(1) if zero is None else zero
        grid = spec.grid
        assert isinstance(grid, IntGrid)
        x = ((x_TK.float() / scale + zero).round().clamp(grid.low, grid.high) - zero).double() * scale.double()
    values = q.spec.grid.decode(q.codes).double()
    values = values if q.zero is None else values - expand(q.zero, q.spec, q.shape)
    return x @ (values * expand(q.scale, q.spec, q.shape)).T


def close(y: Tensor, expected: Tensor, x_TK: Tensor, q: QTensor) -> None:
    """Equal up to roundings of x's type: of each factor, at random, of each output and of scales, all the same way.

    Rounding both factors gives an error of standard deviation 0.8 u sqrt(sum (x w)^2); 6 u is beyond 7 of these.
    Sums are kept in float32, whose roundings matter when x is float32 itself.
    """
    u, tiny = torch.finfo(x_TK.dtype).eps / 2, torch.finfo(x_TK.dtype).tiny
    size = (x_TK.double().square() @ q.dequantize().double().square().T).sqrt()
    bound = (6 * u + 3 * 2**-24 * x_TK.shape[1] ** 0.5) * size + 2 * u * expected.abs() + tiny
    worst = ((y.double() - expected).abs() / bound).max().item() if y.numel() else 0.0
    assert worst <= 1, f"{worst:.3g} times the bound"


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


IDS = sorted(formats())
sampled = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize("format_id", IDS)
def test_has_layers_to_test(format_id: str) -> None:
    assert len(held(format_id)) >= 5


@pytest.mark.parametrize("format_id", IDS)
def test_bytes(format_id: str) -> None:
    fmt = format_named(format_id)

    @sampled
    @given(st.sampled_from(held(format_id)), st.integers(0, 9))
    def run(layer: Layer, seed: int) -> None:
        q, x_TK = make(layer, seed)
        tensors = tensors_of(fmt, layer, q, x_TK)
        assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == fmt.layout(layer)
        assert fmt.check(tensors, layer) is None
        assert all(t.is_contiguous() for t in tensors.values())
        module = QuantLinear.from_qtensor(q, fmt, inputs=layer.inputs, input_range=input_range(layer, x_TK))
        assert site_bits(module) == sum(8 * t.numel() * t.element_size() for t in tensors.values())
        back = fmt.unpack(tensors, layer)
        assert torch.equal(back.codes, q.codes)
        assert torch.equal(back.scale, q.scale)
        assert back.zero is q.zero is None or torch.equal(back.zero, q.zero)  # type: ignore[arg-type]
        for dtype in DTYPES:
            assert torch.equal(fmt.weight(tensors, layer, dtype), q.dequantize(dtype))

    run()


@pytest.mark.parametrize("format_id", IDS)
def test_reference_is_the_definition(format_id: str) -> None:
    fmt = format_named(format_id)

    @sampled
    @given(st.sampled_from(held(format_id)), st.sampled_from(DTYPES), st.integers(0, 9))
    def run(layer: Layer, dtype: torch.dtype, tokens: int) -> None:
        q, x_TK = make(layer, 0)
        tensors, x_TK = tensors_of(fmt, layer, q, x_TK), x_TK[:tokens].to(dtype)
        y_TN = fmt.linear(x_TK, tensors, [], layer, "reference")
        assert y_TN.dtype == dtype
        close(y_TN, slow_linear(fmt, x_TK, q, layer, tensors), x_TK, q)

    run()


def supported(format_id: str, name: str, device: torch.device = CPU) -> list[tuple[Layer, torch.dtype]]:
    """What a kernel runs on such a device of this machine."""
    kernel = kernel_named(format_id, name)
    return [(x, d) for x, d in product(held(format_id), DTYPES) if kernel.supports(x, device, d) is None]


def kernel_named(format_id: str, name: str) -> Kernel:
    return next(k for k in format_named(format_id).kernels if k.name == name)


KERNELS = [(format_id, kernel.name) for format_id in IDS for kernel in format_named(format_id).kernels]
CPU_KERNELS = [case for case in KERNELS if supported(*case)]


def run_kernel(case: tuple[Layer, torch.dtype], tokens: int, format_id: str, name: str, device: torch.device) -> None:
    """One kernel on one layer, against the definition."""
    (layer, dtype), fmt, kernel = case, format_named(format_id), kernel_named(format_id, name)
    q, x_TK = make(layer, tokens)
    tensors = tensors_of(fmt, layer, q, x_TK)
    x_TK = x_TK.repeat(17, 1)[:tokens].to(dtype)
    there = {n: t.to(device) for n, t in tensors.items()}
    blob = kernel.prepare(there, layer, dtype)
    y_TN = fmt.linear(x_TK.to(device), there, blob, layer, name)
    assert y_TN.dtype == dtype
    assert y_TN.shape == (tokens, layer.shape[0])
    close(y_TN.cpu(), slow_linear(fmt, x_TK, q, layer, tensors), x_TK, q)
    # strides of any kind are the operator's to handle
    wide = x_TK.to(device).repeat(1, 2)[:, : layer.shape[1]]
    assert torch.equal(fmt.linear(wide, there, blob, layer, name), y_TN)


@pytest.mark.parametrize(("format_id", "name"), CPU_KERNELS)
def test_kernel_equals_reference(format_id: str, name: str) -> None:
    @sampled
    @given(st.sampled_from(supported(format_id, name)), st.sampled_from((0, 1, 2, 9, 40, 150)))
    def run(case: tuple[Layer, torch.dtype], tokens: int) -> None:
        run_kernel(case, tokens, format_id, name, CPU)

    run()


@pytest.mark.gpu
@pytest.mark.parametrize(("format_id", "name"), KERNELS)
def test_kernel_equals_reference_on_gpu(format_id: str, name: str) -> None:
    gpu = torch.device("cuda")
    cases = supported(format_id, name, gpu)
    for case, tokens in product(cases[:: max(1, len(cases) // 100)], (1, 9, 40, 150)):
        run_kernel(case, tokens, format_id, name, gpu)


@pytest.mark.parametrize(("format_id", "name"), [(i, "reference") for i in IDS] + CPU_KERNELS)
def test_operator(format_id: str, name: str) -> None:
    """torch's own checks of schema, fake and autograd; and one node under compile, with the same gradient."""
    fmt = format_named(format_id)
    cases = [(layer, torch.float32) for layer in held(format_id)] if name == "reference" else supported(format_id, name)
    layer, dtype = max(cases, key=lambda c: c[0].inputs is not None and c[0].inputs.range == "static")
    q, x_TK = make(layer, 1)
    tensors = tensors_of(fmt, layer, q, x_TK)
    blob = next((k.prepare(tensors, layer, dtype) for k in fmt.kernels if k.name == name), [])
    x_TK = x_TK.to(dtype).requires_grad_()
    torch.library.opcheck(fmt.op, (x_TK, [tensors[n] for n in sorted(tensors)], blob, layer.key, name))

    def f(x: Tensor) -> Tensor:
        return F.relu(fmt.linear(x, tensors, blob, layer, name) * 2)

    y_TN = f(x_TK)
    (gradient,) = torch.autograd.grad(y_TN.sum(), x_TK)
    expected = (y_TN > 0).to(dtype) * 2 @ q.dequantize(dtype)
    assert torch.equal(gradient, expected)
    torch.compiler.reset()  # every format and kernel compiles the same function
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x_TK), y_TN)
    assert torch.equal(torch.autograd.grad(compiled(x_TK).sum(), x_TK)[0], expected)


@pytest.mark.parametrize("format_id", IDS)
def test_refusals_have_reasons(format_id: str) -> None:
    fmt = format_named(format_id)
    for layer in LAYERS:
        reason = fmt.holds(layer)
        assert reason is None or len(reason) > 10
        if reason is None:
            for device in (CPU, torch.device("cuda"), torch.device("meta")):
                name, refused = choose_kernel(fmt, layer, device, torch.bfloat16)
                assert all(len(r) > 10 for r in refused.values())
                assert name == "reference" or name not in refused


def test_layer_keys_are_their_inverse() -> None:
    for layer in held(IDS[0]):
        assert Layer.from_key(layer.key) == layer


def test_integers_always_find_a_format() -> None:
    for layer in LAYERS:
        if isinstance(layer.weights.grid, IntGrid):
            assert format_for(layer).holds(layer) is None
