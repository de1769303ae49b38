"""What stands around a product runs within the kernel's passes: layers as on a GPU, run by Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_quant.formats import Layer, format_for
from hf_quant.grids import E4M3, FloatGrid
from hf_quant.hadamard import Hadamard
from hf_quant.kernels.hadamard import op
from hf_quant.kernels.hadamard.dense import Dense
from hf_quant.kernels.hadamard.gpu import Triton
from hf_quant.runtime.branches import LowRank
from hf_quant.runtime.clock import Clock
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec, act_spec, int_spec

N, K, T, R = 40, 64, 6, 20
FLOAT32 = FloatGrid("float32")
FLOAT8 = Spec(grid=E4M3, scale=FLOAT32), Spec(grid=E4M3, index="token", range="dynamic", scale=FLOAT32)
CASES = {
    "w4": (int_spec(4, 32), None),
    "w4a8": (int_spec(4, symmetric=True), act_spec(8)),
    "w3a8": (int_spec(3), act_spec(8, symmetric=False)),
    "fp8": FLOAT8,
}
FUSED = [name for name in CASES if name != "w4"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("hf_quant.kernels._gemm.machine.refuses", lambda device, dtype: None)
    monkeypatch.setattr("hf_quant.kernels._cpu.native.why_not", lambda: "as on a GPU")
    yield
    torch.compiler.reset()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches that a layer makes, by kernel."""
    from hf_quant.kernels._gemm import launch, quantized

    seen: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: object) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: object) -> object:
            seen.append(self.name)
            return self.kernel[grid]  # type: ignore[index]

    for module, name in (
        (launch.loop, "gemm_fwd_kernel"),
        (quantized, "tokens_fwd_kernel"),
        (quantized, "scaled_fwd_kernel"),
    ):
        monkeypatch.setattr(module, name, Counted(name.removesuffix("_fwd_kernel"), getattr(module, name)))
    return seen


def tensor(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def layer(weights: Spec, inputs: Spec | None, **extras: object) -> QuantLinear:
    q = refit(tensor(N, K), weights)
    fmt = format_for(Layer((N, K), weights, inputs))
    return QuantLinear.from_qtensor(q, fmt, inputs=inputs, dtype=torch.float32, **extras)  # type: ignore[arg-type]


def apart(module: QuantLinear, x: Tensor) -> Tensor:
    """The same layer, nothing of it by a Triton kernel."""
    before = module.kernel, module._fuses, module._blob
    module.kernel, module._fuses, module._blob = "reference", frozenset(), []
    kept = dict(module._parameters)
    for name, t in module.packed_tensors().items():
        module._parameters[name] = torch.nn.Parameter(t, requires_grad=False)
    y = module(x)
    module._parameters.update(kept)
    module.kernel, module._fuses, module._blob = before
    return y


def same(module: QuantLinear, x: Tensor, compiled: bool = True) -> Tensor:
    """Equal to the reference up to a rounding that falls the other way; gradients and compilation too."""
    y, wanted = module(x), apart(module, x)
    assert module.kernel.startswith("triton")
    assert (y - wanted).norm() < 4e-3 * wanted.norm()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    module(mine).square().sum().backward()
    apart(module, theirs).square().sum().backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    assert (mine.grad - theirs.grad).norm() < 1e-2 * theirs.grad.norm()
    if compiled:
        torch.compiler.reset()
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), y)
    return y


@pytest.mark.parametrize("case", CASES)
def test_a_branch_joins_in_the_epilogue(case: str, passes: list[str]) -> None:
    module = layer(*CASES[case], branches=[LowRank(tensor(R, K), tensor(N, R))])
    same(module, tensor(T, K))
    passes.clear()
    with torch.no_grad():
        module(tensor(T, K))
    assert len(passes) == (1 if case == "w4" else 2)


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("rotation", [Hadamard(64, 3), Hadamard(16), Hadamard(64)])
def test_a_rotation_goes_with_the_rounding(case: str, rotation: Hadamard, passes: list[str]) -> None:
    module = layer(*CASES[case], rotation=rotation)
    same(module, tensor(T, K), compiled=rotation.seed == 3)
    passes.clear()
    with torch.no_grad():
        module(tensor(T, K))
    assert passes.count("tokens") == 1
    assert len(passes) == 2


def test_a_rotation_before_what_cannot_take_it(passes: list[str]) -> None:
    """A branch reads the rotated input as well; an input that is not rounded is transformed by itself, in one pass."""
    module = layer(*CASES["w4a8"], rotation=Hadamard(64, 3), branches=[LowRank(tensor(R, K), tensor(N, R))])
    same(module, tensor(T, K))
    same(layer(*CASES["w4"], rotation=Hadamard(64, 3)), tensor(T, K))
    assert passes.count("tokens") > 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", [int_spec(4, symmetric=True), int_spec(8, symmetric=True)])
def test_ranges_by_timestep_are_looked_up_in_the_pass(weights: Spec, symmetric: bool, passes: list[str]) -> None:
    inputs = act_spec(8, static=True, symmetric=symmetric)
    inputs = Spec(**{**{n: getattr(inputs, n) for n in inputs.__slots__}, "index": "timestep", "entries": 3})
    zero = None if symmetric else torch.tensor([[100.0], [128.0], [90.0]])
    scale = torch.tensor([[0.01], [0.03], [0.02]])
    module = layer(weights, inputs, input_range=(scale, zero))
    module.clock = Clock((0, 10, 20))
    x = tensor(T, K)
    results = []
    for steps in ([0, 0], [19, 1], [11, 22]):
        module.clock.entry_B = module.clock.nearest(torch.tensor(steps))
        passes.clear()
        with torch.no_grad():
            results.append(module(x))
        assert passes[0] == "tokens"
        assert len(passes) == 2
        same(module, x, compiled=False)
    assert not torch.equal(results[0], results[1])


def test_the_transform_alone() -> None:
    triton, dense = Triton(), Dense()
    assert op.KERNELS[0].supports(tensor(2, 64), 64) is None
    assert triton.supports(tensor(2, 24), 24) is not None
    for size, seed, inverse in ((64, None, False), (16, 5, False), (32, 5, True), (4096, 1, True)):
        x = tensor(2, 3, 64)
        torch.testing.assert_close(triton.run(x, size, seed, inverse), dense.run(x, size, seed, inverse))
