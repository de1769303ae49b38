"""What every packed format owes, whoever wrote it, as functions that raise `AssertionError`.

`hf_quant/every_format_test.py` runs them on all that is registered. A package of its own runs them on its own formats:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
    def test_my_format(check, tmp_path):
        fmt = format_named("my-format/1")
        check(fmt, sample_layers(fmt), tmp_path)
"""

import inspect
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_quant.formats import ALONE, Kernel, Layer, PackedFormat, choose_kernel
from hf_quant.ledger import site_bits
from hf_quant.runtime.linear import QuantLinear
from hf_quant.testing.format_layers import close, every_layer, input_range, make, sample_layers, slow_linear, tensors_of

__all__ = ["CHECKS", "Check", "sample_layers"]

Check = Callable[[PackedFormat, Sequence[Layer], Path], None]

T = TypeVar("T")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATOR = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
TOKENS = (0, 1, 2, 9, 40, 150)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote reads as NaN."""
    memory: Any = torch.utils.deterministic
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        memory.fill_uninitialized_memory = fills


def on_some(cases: Sequence[T], check: Callable[[T, random.Random], None], most: int = 40) -> None:
    """Run it on cases from all over, the same ones every time; what fails says on which."""
    drawn = random.Random(0)
    for case in drawn.sample(cases, min(most, len(cases))):
        try:
            with poisoned():
                check(case, drawn)
        except BaseException as error:
            error.add_note(f"on {case}")
            raise


# ---- what it says ---------------------------------------------------------------------------------------------------


def says_in_writing_what_its_bytes_are(fmt: PackedFormat, layers: Sequence[Layer], _: Path) -> None:
    """An id that is a promise, and a README beside the format that gives the layout."""
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*/[1-9]\d*", fmt.id), f"{fmt.id!r} is not of the form my-format/1"
    assert readme_of(fmt).is_file(), f"there is no {readme_of(fmt)}, which says what the bytes are"
    readme = readme_of(fmt).read_text()
    assert fmt.id in readme
    assert layers, "no layer to try it on"
    for name in fmt.weight_layout(layers[0]):
        assert name in readme, f"the README does not say what {name} is"


def readme_of(fmt: PackedFormat) -> Path:
    """Where it is looked for: beside the file that defines the format's class."""
    return Path(inspect.getfile(type(fmt))).with_name("README.md")


def its_refusals_have_reasons(fmt: PackedFormat, layers: Sequence[Layer], _: Path) -> None:
    """A layer it cannot hold, a kernel that cannot run: a sentence says why not. What it holds, something runs."""
    refused = [reason for layer in every_layer() if (reason := fmt.holds(layer)) is not None]
    assert all(len(reason) > 10 for reason in refused), refused
    for layer in layers:
        assert fmt.holds(layer) is None, f"it does not hold {layer}: {fmt.holds(layer)}"
        assert Layer.from_key(layer.key) == layer
        for device in (CPU, torch.device("cuda"), torch.device("meta")):
            name, reasons = choose_kernel(fmt, layer, device, torch.bfloat16)
            assert all(len(r) > 10 for r in reasons.values()), reasons
            assert name == "reference" or name not in reasons


# ---- what it stores -------------------------------------------------------------------------------------------------


def unpacks_what_it_packs(fmt: PackedFormat, layers: Sequence[Layer], _: Path) -> None:
    """The layout is as it says, its bytes are those counted, and codes, scales and values come back to the bit."""

    def check(layer: Layer, drawn: random.Random) -> None:
        q, x_TK = make(layer, drawn.randrange(10))
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
            assert mine is its is None or (mine is not None and its is not None and torch.equal(mine, its))
        some = torch.tensor([0, layer.shape[0] - 1, layer.shape[0] // 2, 0])
        assert torch.equal(fmt.rows(some, tensors, layer), q.dequantize()[some])
        for dtype in DTYPES:
            assert torch.equal(fmt.weight(tensors, layer, dtype), q.dequantize(dtype))

    on_some(layers, check)


def packs_the_same_twice_and_survives_the_disk(fmt: PackedFormat, layers: Sequence[Layer], folder: Path) -> None:
    """Through a safetensors file and back, to the bit."""
    for layer in layers[:: max(1, len(layers) // 12)]:
        q, x_TK = make(layer, 3)
        tensors, again = tensors_of(fmt, layer, q, x_TK), tensors_of(fmt, layer, q, x_TK)
        save_file(tensors, folder / "x.safetensors")
        stored = load_file(folder / "x.safetensors")
        for name, tensor in tensors.items():
            assert _bits(again[name]).equal(_bits(tensor))
            assert _bits(stored[name]).equal(_bits(tensor))
        assert fmt.check(stored, layer) is None
        assert fmt.weight(stored, layer, torch.float32).equal(q.dequantize(torch.float32))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # 8-bit floats cannot be compared as they are


# ---- what it computes -----------------------------------------------------------------------------------------------


def its_reference_is_the_definition(fmt: PackedFormat, layers: Sequence[Layer], _: Path) -> None:
    """`q(x) W^T` up to roundings, in every type and for any number of tokens."""

    def check(layer: Layer, drawn: random.Random) -> None:
        dtype = drawn.choice(DTYPES)
        q, x_TK = make(layer, 0)
        tensors, x_TK = tensors_of(fmt, layer, q, x_TK), x_TK[: drawn.randrange(10)].to(dtype)
        y_TN = fmt.linear(x_TK, tensors, [], layer, "reference")
        assert y_TN.dtype == dtype
        close(y_TN, slow_linear(fmt, x_TK, q, layer, tensors), x_TK, q)

    on_some(layers, check)


Case = tuple[Layer, torch.dtype]


def supported(fmt: PackedFormat, layers: Sequence[Layer], kernel: Kernel, device: torch.device = CPU) -> list[Case]:
    """What a kernel runs on such a device of this machine."""
    return [(x, d) for x, d in product(layers, DTYPES) if kernel.supports(x, device, d) is None]


def run_kernel(case: Case, tokens: int, fmt: PackedFormat, kernel: Kernel, device: torch.device) -> None:
    """One kernel on one layer, against the definition."""
    layer, dtype = case
    q, x_TK = make(layer, tokens)
    tensors = tensors_of(fmt, layer, q, x_TK)
    x_TK = x_TK.repeat(17, 1)[:tokens].to(dtype)
    there = {n: t.to(device) for n, t in tensors.items()}
    blob = kernel.prepare(there, layer, dtype)
    y_TN = fmt.linear(x_TK.to(device), there, blob, layer, kernel.name)
    assert y_TN.dtype == dtype
    assert y_TN.shape == (tokens, layer.shape[0])
    # tensor cores keep some 13 bits of the largest float8 product while they add
    sums = 2**-13 if kernel.name == "triton-float8" and device.type == "cuda" else 2**-24
    close(y_TN.cpu(), slow_linear(fmt, x_TK, q, layer, tensors), x_TK, q, sums)
    # strides of any kind are the operator's to handle
    wide = x_TK.to(device).repeat(1, 2)[:, : layer.shape[1]]
    assert torch.equal(fmt.linear(wide, there, blob, layer, kernel.name), y_TN)


def kernel_equals_reference(fmt: PackedFormat, layers: Sequence[Layer], kernel: Kernel) -> None:
    """One kernel on all that it runs on CPU."""
    on_some(supported(fmt, layers, kernel), lambda c, drawn: run_kernel(c, drawn.choice(TOKENS), fmt, kernel, CPU))


def layout_gives_back_what_it_replaces(fmt: PackedFormat, layers: Sequence[Layer], kernel: Kernel) -> None:
    """`restore` is the inverse of `prepare`, to the bit and in place of the tensors; the kernel runs without them."""
    assert fmt.restore([], layers[0], "reference") == {}

    def check(case: Case, drawn: random.Random) -> None:
        layer, dtype = case
        q, x_TK = make(layer, drawn.randrange(10))
        tensors = tensors_of(fmt, layer, q, x_TK)
        blob = kernel.prepare(tensors, layer, dtype)
        found = fmt.restore(blob, layer, kernel.name)
        assert set(found) == set(fmt.replaces[kernel.name]) >= {"qweight"}
        for key, tensor in found.items():
            assert tensor.is_contiguous()
            assert (tensor.shape, tensor.dtype) == (tensors[key].shape, tensors[key].dtype)
            assert torch.equal(tensor.view(torch.uint8), tensors[key].view(torch.uint8))
        kept = {n: t for n, t in tensors.items() if n not in found}
        x_TK = x_TK.to(dtype)
        alone = fmt.linear(x_TK, kept, blob, layer, kernel.name)
        assert torch.equal(alone, fmt.linear(x_TK, tensors, blob, layer, kernel.name))

    on_some(supported(fmt, layers, kernel), check)


def is_an_operator(fmt: PackedFormat, layers: Sequence[Layer], kernel: Kernel | None = None) -> None:
    """torch's own checks of schema, fake and autograd; and one node under compile, with the same gradient."""
    name = "reference" if kernel is None else kernel.name
    cases = [(layer, torch.float32) for layer in layers] if kernel is None else supported(fmt, layers, kernel)
    layer, dtype = max(cases, key=lambda c: c[0].inputs is not None and c[0].inputs.range == "static")
    q, x_TK = make(layer, 1)
    tensors = tensors_of(fmt, layer, q, x_TK)
    blob = [] if kernel is None else kernel.prepare(tensors, layer, dtype)
    x_TK = x_TK.to(dtype).requires_grad_()
    operands = [tensors[n] for n in sorted(tensors) if n not in fmt.replaces.get(name, ())]
    checks = list(OPERATOR)
    if any(t.is_floating_point() and t.element_size() == 1 for t in operands):
        checks.remove("test_schema")  # it compares operands before and after, which torch cannot do in 8-bit floats
    op: Any = fmt.op
    _opcheck(op, (x_TK, operands, blob, layer.key, name, *ALONE.arguments), checks)
    if name in fmt.replaces:
        restore = getattr(torch.ops.hf_quant, fmt.id.replace("-", "_").replace("/", "_") + "_restore")
        _opcheck(restore.default, (blob, layer.key, name), OPERATOR)

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


def _opcheck(op: Any, operands: tuple[Any, ...], checks: Sequence[str]) -> None:  # noqa: ANN401  an operator
    found = torch.library.opcheck(op, operands, test_utils=checks, raise_exception=False)
    failed = {check: told for check, told in found.items() if told != "SUCCESS"}
    assert not failed, f"torch.library.opcheck: {failed}"


def its_kernels_compute_the_same(fmt: PackedFormat, layers: Sequence[Layer], _: Path) -> None:
    """Each that runs on this machine's CPU, and on some layers on its GPU; what a kernel replaces comes back."""
    for kernel in fmt.kernels:
        kernel_equals_reference(fmt, layers, kernel)
        if kernel.name in fmt.replaces and supported(fmt, layers, kernel):
            layout_gives_back_what_it_replaces(fmt, layers, kernel)
        if torch.cuda.is_available():
            kernel_equals_reference_on_gpu(fmt, layers, kernel)


def kernel_equals_reference_on_gpu(
    fmt: PackedFormat, layers: Sequence[Layer], kernel: Kernel, tokens: Sequence[int] = (1, 9, 40, 150)
) -> None:
    """Some of what it takes: every case is a kernel to compile."""
    gpu = torch.device("cuda")
    cases = supported(fmt, layers, kernel, gpu)
    for case, number in product(cases[:: max(1, len(cases) // 6)], tokens):
        with poisoned():
            run_kernel(case, number, fmt, kernel, gpu)


def its_products_are_operators(fmt: PackedFormat, layers: Sequence[Layer], _: Path) -> None:
    """`is_an_operator`, of the reference and of every kernel that runs on this machine's CPU."""
    for kernel in (None, *(k for k in fmt.kernels if supported(fmt, layers, k))):
        with poisoned():
            is_an_operator(fmt, layers, kernel)


CHECKS: tuple[Check, ...] = (
    says_in_writing_what_its_bytes_are,
    its_refusals_have_reasons,
    unpacks_what_it_packs,
    packs_the_same_twice_and_survives_the_disk,
    its_reference_is_the_definition,
    its_kernels_compute_the_same,
    its_products_are_operators,
)
