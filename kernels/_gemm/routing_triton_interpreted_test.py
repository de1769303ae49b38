"""Products by expert, run by Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_quant.every_format_test import DTYPES, close, kernel_named, make, slow_linear, tensors_of
from hf_quant.formats import Layer, format_named
from hf_quant.grids import E4M3, FloatGrid
from hf_quant.kernels._gemm.configs import Config
from hf_quant.kernels._gemm.every_triton_interpreted_test import each, taken
from hf_quant.kernels._gemm.kernel import TritonKernel
from hf_quant.kernels._gemm.launch import dequantize, matmul
from hf_quant.kernels._gemm.operand import Weight, affine_ranges, ranges_of
from hf_quant.kernels._gemm.routing import by_expert
from hf_quant.runtime.experts_test import apart, quantized, routing
from hf_quant.runtime.install import dequantize_model
from hf_quant.runtime.laid_out import LaidOut
from hf_quant.spec import Spec, act_spec, int_spec

FLOAT32 = FloatGrid("float32")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 60), st.integers(1, 4), st.integers(1, 9), st.sampled_from((1, 4, 16)))
def test_every_row_lies_in_a_tile_of_its_expert(T: int, copies: int, experts: int, BM: int) -> None:
    chosen = torch.randint(-1, experts + 1, (T, copies), generator=torch.Generator().manual_seed(T))
    order, tile = by_expert(chosen, experts, BM)
    assert len(order) == len(tile) * BM
    inside = (chosen >= 0) & (chosen < experts)
    rows = order[order < T * copies]
    assert sorted(rows.tolist()) == inside.flatten().nonzero()[:, 0].tolist()
    for e, rows in zip(tile.tolist(), order.view(-1, BM).tolist(), strict=True):
        assert all(chosen.flatten()[r] == e for r in rows if r < T * copies)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 4), st.sampled_from((torch.float16, torch.bfloat16)))
def test_products_by_expert(T: int, copies: int, experts: int, dtype: torch.dtype) -> None:
    """Each row is the product of its token with its expert's weight, whatever else the launch computes."""
    g = torch.Generator().manual_seed(T)
    N, K, group, BM = 40, 80, 32, 16
    weight = Weight((N, K), 4, group, ranges="pairs")
    blobs = []
    for _ in range(experts):
        codes = torch.randint(0, 16, (N, K), generator=g, dtype=torch.uint8)
        scale = (torch.rand(N, -(-K // group), generator=g) + 0.5).to(dtype)
        zero = torch.randint(0, 16, scale.shape, generator=g, dtype=torch.uint8)
        blobs.append([weight.shuffle.pack(codes), *affine_ranges(scale, zero, N, dtype)])
        assert ranges_of(blobs[-1]) == "pairs"
    stacked = [torch.stack(parts) for parts in zip(*blobs, strict=True)]
    x = torch.randn(T, K, generator=g).to(dtype)
    chosen = torch.randint(0, experts, (T, copies), generator=g)
    y = matmul(x, stacked, weight, dtype, experts=chosen, config=Config("tensor", BM=BM, BN=32))
    for row, e in enumerate(chosen.flatten().tolist()):
        expected = x[row // copies].double() @ dequantize(blobs[e], weight, dtype).double().T
        assert (y[row].double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max() + 1e-3


@each
def test_every_kernel_groups(format_id: str, name: str) -> None:
    """Stacked blobs: each row is what its expert alone gives, tables, sums and scales of tokens included."""
    fmt, kernel = format_named(format_id), kernel_named(format_id, name)
    assert isinstance(kernel, TritonKernel)

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(
        st.sampled_from([x for x in taken(format_id, name) if x.inputs is None or not x.inputs.stored]),
        st.sampled_from(DTYPES),
        st.integers(0, 9),
        st.integers(1, 3),
    )
    def run(layer: Layer, dtype: torch.dtype, tokens: int, copies: int) -> None:
        made = [make(layer, seed) for seed in range(3)]
        blobs = [kernel.prepare(fmt.pack(q), layer, dtype) for q, _ in made]
        if len({tuple((t.shape, t.dtype) for t in blob) for blob in blobs}) > 1:
            return  # zero points in a word with some scales and not with others: no group
        x_TK = made[0][1][:tokens].to(dtype)
        chosen = torch.randint(-1, 4, (tokens, copies), generator=torch.Generator().manual_seed(tokens))
        y_MN = kernel.grouped(x_TK, chosen, [torch.stack(parts) for parts in zip(*blobs, strict=True)], layer)
        assert (y_MN.dtype, y_MN.shape) == (dtype, (tokens * copies, layer.shape[0]))
        for e, (q, _) in enumerate(made):
            rows = (chosen.flatten() == e).nonzero()[:, 0]
            x = x_TK[rows // copies]
            close(y_MN[rows], slow_linear(fmt, x, q, layer, fmt.pack(q)), x, q)
        assert not y_MN[(chosen.flatten() < 0) | (chosen.flatten() > 2)].any()

    run()


@each
def test_dense_is_the_weight(format_id: str, name: str) -> None:
    """A blob alone gives the reference's bits, for the gradient."""
    fmt, kernel = format_named(format_id), kernel_named(format_id, name)
    assert isinstance(kernel, TritonKernel)

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(st.sampled_from(taken(format_id, name)), st.sampled_from(DTYPES), st.integers(0, 9))
    def run(layer: Layer, dtype: torch.dtype, seed: int) -> None:
        q, x_TK = make(layer, seed)
        tensors = tensors_of(fmt, layer, q, x_TK)
        assert torch.equal(kernel.dense(kernel.prepare(tensors, layer, dtype), layer, dtype), q.dequantize(dtype))

    run()


@pytest.mark.parametrize(
    ("spec", "inputs", "kernel"),
    [
        (int_spec(4, 4), None, "triton"),
        (int_spec(3), act_spec(8, symmetric=False), "triton"),
        (
            Spec(grid=E4M3, scale=FLOAT32),
            Spec(grid=E4M3, index="token", range="dynamic", scale=FLOAT32),
            "triton-float8",
        ),
    ],
)
def test_a_mixture_of_experts_runs_one_launch_a_matrix(
    spec: Spec, inputs: Spec | None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: transformers' experts, saved as canonical bytes, held once, with gradients, compiled whole."""
    torch.compiler.reset()
    monkeypatch.setattr("hf_quant.kernels._gemm.machine.refuses", lambda device, dtype: None)
    monkeypatch.setattr("hf_quant.kernels._cpu.native.why_not", lambda: "as on a GPU")
    experts, args = quantized("mixtral", spec, torch.float32, inputs), routing()
    before = {name: t.clone() for name, t in experts.state_dict().items()}
    wanted = apart(experts, args)
    launches: list[str] = []
    grouped = TritonKernel.grouped
    monkeypatch.setattr(TritonKernel, "grouped", lambda self, *a: launches.append(self.name) or grouped(self, *a))
    monkeypatch.setattr(TritonKernel, "run", lambda *_: pytest.fail("an expert runs by itself"))
    y = experts(*args)
    assert launches == [kernel] * 2
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    for name, tensor in experts.state_dict().items():
        assert torch.equal(tensor.flatten().view(torch.uint8), before[name].flatten().view(torch.uint8))
    group = experts._groups["down"]
    assert group is not None
    words = group.blob[0]
    for e in range(len(words)):
        layer = experts.expert(e).down
        assert isinstance(layer.qweight, LaidOut)
        assert layer.qweight.source[2][0].data_ptr() == words[e].data_ptr(), "the words are held twice"
    x = args[0].clone().requires_grad_()
    experts(x, *args[1:]).sum().backward()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    again = args[0].clone().requires_grad_()
    z = compiled(again, *args[1:])
    z.sum().backward()
    assert torch.equal(z, y)
    assert torch.equal(again.grad, x.grad)
    if inputs is None:
        plain = dequantize_model(nn.ModuleDict({"a": experts}))["a"]
        mine = args[0].clone().requires_grad_()
        plain(mine, *args[1:]).sum().backward()
        torch.testing.assert_close(mine.grad, x.grad, rtol=1e-3, atol=1e-3)
