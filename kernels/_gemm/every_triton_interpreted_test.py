"""Every format's GPU kernel against the definition, run by Triton's interpreter. To be registered is to be covered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.every_format_test import CPU, DTYPES, held, kernel_named, make, run_kernel, tensors_of
from hf_quant.formats import Around, Layer, format_named, formats
from hf_quant.kernels._gemm.kernel import TritonKernel
from hf_quant.runtime.laid_out import LaidOut
from hf_quant.runtime.linear import QuantLinear

KERNELS = [(i, k.name) for i, fmt in sorted(formats().items()) for k in fmt.kernels if isinstance(k, TritonKernel)]
each = pytest.mark.parametrize(("format_id", "name"), KERNELS)


def taken(format_id: str, name: str) -> list[Layer]:
    kernel = kernel_named(format_id, name)
    assert isinstance(kernel, TritonKernel)
    return [layer for layer in held(format_id) if kernel.takes(layer) is None]


def test_which() -> None:
    ids = {"int-group/1", "int8-act/1", "lut-group/1", "codebook-group/1", "float8/1", "bnb-nf4/1"}
    assert ids <= {format_id for format_id, _ in KERNELS}


@each
def test_products(format_id: str, name: str) -> None:
    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(st.sampled_from(taken(format_id, name)), st.sampled_from(DTYPES), st.sampled_from((0, 1, 2, 9, 40)))
    def run(layer: Layer, dtype: torch.dtype, tokens: int) -> None:
        run_kernel((layer, dtype), tokens, format_id, name, CPU)

    run()


@pytest.mark.parametrize(("format_id", "name"), [k for k in KERNELS if k[1] == "triton" and k[0] != "int8-act/1"])
def test_one_hot_is_the_weight(format_id: str, name: str) -> None:
    """One-hot tokens print the decoded weights: the bits of the reference."""
    fmt, kernel = format_named(format_id), kernel_named(format_id, name)

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(
        st.sampled_from([x for x in taken(format_id, name) if x.inputs is None and x.weights.rotation is None]),
        st.sampled_from(DTYPES),
        st.integers(0, 9),
    )
    def run(layer: Layer, dtype: torch.dtype, seed: int) -> None:
        q, x_TK = make(layer, seed)
        tensors = tensors_of(fmt, layer, q, x_TK)
        K = layer.shape[1]
        for columns in (range(K), range(min(K, 3))):  # many tokens and few
            one_hot = torch.eye(K, dtype=dtype)[list(columns)]
            y_TN = kernel.run(one_hot, tensors, kernel.prepare(tensors, layer, dtype), layer)
            assert torch.equal(y_TN, fmt.weight(tensors, layer, dtype).T[list(columns)])

    run()


@each
@pytest.mark.parametrize("tokens", [1, 20])
def test_low_rank(format_id: str, name: str, tokens: int) -> None:
    """The branch joins in the epilogue: what the product and the branch give apart, with one rounding less."""
    fmt, kernel, layer = format_named(format_id), kernel_named(format_id, name), taken(format_id, name)[-1]
    assert isinstance(kernel, TritonKernel)
    q, x_TK = make(layer, 0)
    tensors, x_TK = tensors_of(fmt, layer, q, x_TK), x_TK.repeat(3, 1)[:tokens]
    generator = torch.Generator().manual_seed(1)
    branch = tuple(torch.randn(n, 20, generator=generator) for n in (tokens, layer.shape[0]))
    blob = kernel.prepare(tensors, layer, torch.float32)
    together = kernel.product(x_TK, tensors, blob, layer, Around((branch[0], branch[1])))
    torch.testing.assert_close(
        together, kernel.run(x_TK, tensors, blob, layer) + branch[0] @ branch[1].T, rtol=1e-5, atol=1e-4
    )


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_runs_it(format_id: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the layer chooses it, has its codes once, saves and differentiates as the reference, compiles."""
    monkeypatch.setattr("hf_quant.kernels._gemm.machine.refuses", lambda device, dtype: None)
    monkeypatch.setattr("hf_quant.kernels._cpu.native.why_not", lambda: "as on a GPU")
    fmt, cases = format_named(format_id), taken(format_id, name)
    layer = max(cases, key=lambda c: c.inputs is None)
    q, x_TK = make(layer, 0)
    x_TK = x_TK.to(dtype)
    module = QuantLinear.from_qtensor(q, fmt, inputs=layer.inputs, dtype=dtype)
    before, W_NK = {n: t.clone() for n, t in module.state_dict().items()}, module.dequantize()
    if module.kernel != name:  # one that is better at this layer stands before it
        assert module.kernel in {k.name for k in fmt.kernels}
        return
    y_TN = module(x_TK)
    assert isinstance(module.qweight, LaidOut)
    wanted = fmt.reference(x_TK, before, layer)
    torch.testing.assert_close(y_TN, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), before[key].reshape(-1).view(torch.uint8))
    x = x_TK.clone().requires_grad_()
    module(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(y_TN) @ W_NK)
    torch.compiler.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x_TK), y_TN)
