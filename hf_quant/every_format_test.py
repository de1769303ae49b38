"""What every packed format owes, checked on every registered one. Being found by `formats()` means being covered."""

import inspect
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_quant.formats import ALONE, Kernel, Layer, PackedFormat, choose_kernel, format_for, format_named, formats
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
from hf_quant.kernels.bnb_4bit.format import FP4, NF4
from hf_quant.ledger import site_bits
from hf_quant.qtensor import QTensor, from_extremes
from hf_quant.runtime.activation import pack_input
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec, act_spec, int_spec

CPU = torch.device("cpu")
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
    *(
        Spec(grid=LevelGrid(x), block=(1, b), scale=FloatGrid("float32"))
        for x in (NF4, sorted({*FP4}))
        for b in (32, 64)
    ),
    *(Spec(grid=LevelGrid(NF4), block=(1, b), scale=FloatGrid(s)) for b, s in ((-1, "float16"), (50, "bfloat16"))),
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
FP8_INPUTS = {"grid": E4M3, "scale": FloatGrid("float32")}
INPUTS = (
    None,
    act_spec(8),
    act_spec(4, symmetric=False),
    act_spec(8, static=True),
    act_spec(8, static=True, symmetric=False),
    Spec(**FP8_INPUTS, index="token", range="dynamic"),
    Spec(**FP8_INPUTS, block=(-1, -1)),
    Spec(grid=E2M1, block=(1, 32), index="token", scale=FloatGrid("float8_e8m0fnu"), range="dynamic"),
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
        for mine, its in ((back.zero, q.zero), (back.codebook, q.codebook), (back.tensor_scale, q.tensor_scale)):
            assert mine is its is None or torch.equal(mine, its)  # type: ignore[arg-type]
        some = torch.tensor([0, layer.shape[0] - 1, layer.shape[0] // 2, 0])
        assert torch.equal(fmt.rows(some, tensors, layer), q.dequantize()[some])
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
    # tensor cores keep some 13 bits of the largest float8 product while they add
    sums = 2**-13 if name == "triton-float8" and device.type == "cuda" else 2**-24
    close(y_TN.cpu(), slow_linear(fmt, x_TK, q, layer, tensors), x_TK, q, sums)
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


@pytest.mark.parametrize(("format_id", "name"), [c for c in CPU_KERNELS if c[1] in format_named(c[0]).replaces])
def test_a_layout_gives_back_what_it_replaces(format_id: str, name: str) -> None:
    """`restore` is the inverse of `prepare`, to the bit and in place of the tensors; the kernel runs without them."""
    fmt = format_named(format_id)
    assert fmt.restore([], held(format_id)[0], "reference") == {}

    @sampled
    @given(st.sampled_from(supported(format_id, name)), st.integers(0, 9))
    def run(case: tuple[Layer, torch.dtype], seed: int) -> None:
        layer, dtype = case
        q, x_TK = make(layer, seed)
        tensors = tensors_of(fmt, layer, q, x_TK)
        blob = kernel_named(format_id, name).prepare(tensors, layer, dtype)
        found = fmt.restore(blob, layer, name)
        assert set(found) == set(fmt.replaces[name]) >= {"qweight"}
        for key, tensor in found.items():
            assert tensor.is_contiguous()
            assert (tensor.shape, tensor.dtype) == (tensors[key].shape, tensors[key].dtype)
            assert torch.equal(tensor.view(torch.uint8), tensors[key].view(torch.uint8))
        kept = {n: t for n, t in tensors.items() if n not in found}
        x_TK = x_TK.to(dtype)
        assert torch.equal(fmt.linear(x_TK, kept, blob, layer, name), fmt.linear(x_TK, tensors, blob, layer, name))

    run()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 9, 40, 150])
@pytest.mark.parametrize(("format_id", "name"), KERNELS)
def test_kernel_equals_reference_on_gpu(format_id: str, name: str, tokens: int) -> None:
    """Some of what it takes: every case is a kernel to compile."""
    gpu = torch.device("cuda")
    cases = supported(format_id, name, gpu)
    for case in cases[:: max(1, len(cases) // 6)]:
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
    operands = [tensors[n] for n in sorted(tensors) if n not in fmt.replaces.get(name, ())]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(t.is_floating_point() and t.element_size() == 1 for t in operands):
        checks.remove("test_schema")  # it compares operands before and after, which torch cannot do in 8-bit floats
    torch.library.opcheck(fmt.op, (x_TK, operands, blob, layer.key, name, *ALONE.arguments), test_utils=checks)
    if name in fmt.replaces:
        restore = getattr(torch.ops.hf_quant, format_id.replace("-", "_").replace("/", "_") + "_restore")
        torch.library.opcheck(restore.default, (blob, layer.key, name))

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


@pytest.mark.parametrize("format_id", IDS)
def test_says_in_writing_what_its_bytes_are(format_id: str) -> None:
    """An id that is a promise, and a README beside the format that gives the layout."""
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*/[1-9]\d*", format_id)
    fmt = format_named(format_id)
    readme = Path(inspect.getfile(type(fmt))).with_name("README.md").read_text()
    assert format_id in readme
    for name in fmt.weight_layout(held(format_id)[0]):
        assert name in readme, f"the README does not say what {name} is"


@pytest.mark.parametrize("format_id", IDS)
def test_packing_is_deterministic_and_survives_the_disk(format_id: str, tmp_path: Path) -> None:
    fmt = format_named(format_id)
    for layer in held(format_id)[:: max(1, len(held(format_id)) // 12)]:
        q, x_TK = make(layer, 3)
        tensors, again = tensors_of(fmt, layer, q, x_TK), tensors_of(fmt, layer, q, x_TK)
        save_file(tensors, tmp_path / "x.safetensors")
        stored = load_file(tmp_path / "x.safetensors")
        for name, tensor in tensors.items():
            bits = tensor.reshape(-1).view(torch.uint8)  # 8-bit floats cannot be compared as they are
            assert again[name].reshape(-1).view(torch.uint8).equal(bits)
            assert stored[name].reshape(-1).view(torch.uint8).equal(bits)
        assert fmt.check(stored, layer) is None
        assert fmt.weight(stored, layer, torch.float32).equal(q.dequantize(torch.float32))
