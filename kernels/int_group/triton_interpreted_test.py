"""The GPU kernel run by Triton's interpreter; kernels/_gemm/interpreter_test.py starts such tests."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.formats import Layer, format_named
from hf_quant.grids import FloatGrid, IntGrid
from hf_quant.kernels._gemm import launch
from hf_quant.kernels._gemm.configs import Config, bucket, choose, kind
from hf_quant.kernels._gemm.launch import dequantize, matmul
from hf_quant.kernels._gemm.operand import ranges_of
from hf_quant.kernels.int_group.bitstream import unpack_bits
from hf_quant.kernels.int_group.gpu import Triton, as_integers, operand
from hf_quant.qtensor import QTensor, as_blocks, from_extremes, nearest
from hf_quant.runtime.activation import pack_input, quantize_input
from hf_quant.spec import Spec, act_spec, int_spec

TARGET = kind(torch.device("cpu"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WAYS = (
    Config("vector", BM=1, BN=16),
    Config("vector", BM=4, BN=32, splits=2),
    Config("tensor", BM=16, BN=32),
    Config("tensor", BM=32, BN=16, splits=3),
    Config("dense"),
)


def quantized(N: int, K: int, spec: Spec) -> tuple[QTensor, dict[str, Tensor], Layer]:
    W_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K))
    blocks = as_blocks(W_NK, spec)
    q = nearest(W_NK, *from_extremes(blocks.amin(-1), blocks.amax(-1), spec), spec)
    return q, format_named("int-group/1").pack(q), Layer((N, K), spec)


specs = st.one_of(
    st.builds(
        int_spec,
        st.integers(1, 8),
        st.sampled_from((-1, 1, 7, 16, 32, 48, 64, 128, 256)),
        symmetric=st.booleans(),
        scale=st.sampled_from(("bfloat16", "float16", "float32")),
    ),
    st.builds(
        Spec,
        grid=st.builds(IntGrid, st.sampled_from((2, 3, 4, 8))),
        zero=st.just("int"),
        block=st.sampled_from(((-1, -1), (-1, 32), (1, 1000))),
        scale=st.just(FloatGrid("bfloat16")),
    ),
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(specs, st.integers(1, 40), st.integers(1, 200), st.sampled_from(DTYPES), st.sampled_from(WAYS))
def test_one_hot_is_the_weight(spec: Spec, N: int, K: int, dtype: torch.dtype, config: Config) -> None:
    """One-hot tokens print the decoded weights: the bits of the reference, whichever way runs."""
    q, tensors, layer = quantized(N, K, spec)
    blob = Triton().prepare(tensors, layer, dtype)
    weight = operand(layer, ranges_of(blob), TARGET)
    tokens = sorted({0, K - 1, *torch.randperm(K, generator=torch.Generator().manual_seed(K))[:20].tolist()})
    one_hot = torch.eye(K, dtype=dtype)[tokens]
    assert torch.equal(matmul(one_hot, blob, weight, dtype, config=config), q.dequantize(dtype).T[tokens])
    assert torch.equal(dequantize(blob, weight, dtype), q.dequantize(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, 64, -1])
def test_small_tiles_on_hopper(bits: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that lie for one instruction, multiplied by another: the tokens' columns change places instead."""
    monkeypatch.setattr(launch, "kind", lambda _: "sm_90")
    N, K, config = 40, 256, Config("tensor", BM=8, BN=32, BK=128, splits=2, num_warps=1)
    q, tensors, layer = quantized(N, K, int_spec(bits, group))
    blob = Triton().prepare(tensors, layer, torch.float16)
    weight = replace(operand(layer, ranges_of(blob), TARGET), unit=2)
    blob[0] = weight.shuffle.pack(unpack_bits(tensors["qweight"], bits, K))
    assert launch.instruction(config, weight, torch.float16, "sm_90")["FRAGMENT"] != weight.unit
    one_hot = torch.eye(K, dtype=torch.float16)[::9]  # every place of a word
    assert torch.equal(matmul(one_hot, blob, weight, torch.float16, config=config), q.dequantize(torch.float16).T[::9])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    specs,
    st.sampled_from((0, 1, 3, 17, 70)),
    st.integers(1, 70),
    st.integers(1, 200),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_products(spec: Spec, M: int, N: int, K: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """Any shape, strides of any kind, the chosen configuration or another; with and without a low-rank branch."""
    q, tensors, layer = quantized(N, K, spec)
    blob = Triton().prepare(tensors, layer, dtype)
    weight = operand(layer, ranges_of(blob), TARGET)
    generator = torch.Generator().manual_seed(M)
    strides = data.draw(st.sampled_from((1, 2)))
    x_MK = torch.randn(M, 2 * K, generator=generator).to(dtype)[:, ::strides][:, :K]
    rank = data.draw(st.sampled_from((0, 1, 16, 20)))
    low_rank = None
    config = data.draw(st.sampled_from((None, *WAYS)))
    chosen = config or choose(weight, dtype, bucket(M), x_MK.device)
    after = launch.constants(weight, dtype, chosen, TARGET)["AFTER"]  # then no weight is rounded to x's type
    W_NK = q.dequantize(torch.float32 if after else dtype).double()
    expected = x_MK.double() @ W_NK.T
    size = (x_MK.double().square() @ W_NK.square().T).sqrt()
    if rank:
        a, up = torch.randn(M, rank, generator=generator).to(dtype), torch.randn(N, rank, generator=generator).to(dtype)
        low_rank = (a, up)
        expected += a.double() @ up.double().T
        size += (a.double().square() @ up.double().square().T).sqrt()
    y_MN = matmul(x_MK, blob, weight, dtype, low_rank=low_rank, config=config)
    assert y_MN.dtype == dtype
    assert y_MN.shape == (M, N)
    # one rounding of the result (two where the branch is added to it), and float32 sums
    unit = torch.finfo(dtype).eps / 2
    partial = (expected.abs() + 4 * size) if rank and config is not None and config.way == "dense" else expected.abs()
    bound = 2.01 * unit * partial + 8 * 2**-24 * K**0.5 * size + torch.finfo(dtype).tiny
    if M:
        worst = ((y_MN.double() - expected).abs() / bound).max().item()
        assert worst <= 1, f"{worst:.3g} times the bound"


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.sampled_from((2, 3, 4, 6, 8)),
    st.sampled_from((-1, 256)),
    st.booleans(),
    st.builds(act_spec, st.sampled_from((4, 8)), static=st.booleans(), symmetric=st.booleans()),
    st.integers(1, 50),
    st.integers(2, 300),
    st.sampled_from(DTYPES),
)
def test_integer_products(
    bits: int, group: int, symmetric: bool, inputs: Spec, N: int, K: int, dtype: torch.dtype
) -> None:
    """Integer inputs: closer to the definition than products of numbers rounded to x's type."""
    spec = int_spec(bits, group, symmetric=symmetric or bits == 8, scale="float32")
    q, tensors, _ = quantized(N, K, spec)
    layer = Layer((N, K), spec, inputs)
    assert as_integers(layer)
    x_TK = torch.randn(5, K, generator=torch.Generator().manual_seed(K)).to(dtype)
    if inputs.range == "static":
        tensors |= pack_input(*from_extremes(x_TK.float().amin(), x_TK.float().amax() * 0.8, inputs))
    y_TN = Triton().run(x_TK, tensors, Triton().prepare(tensors, layer, dtype), layer)
    rounded = quantize_input(x_TK, inputs, tensors).dequantize().double()
    expected = rounded @ q.dequantize().double().T
    size = rounded.abs() @ q.dequantize().double().abs().T
    assert y_TN.dtype == dtype
    # the zero points' term is as large as what it is taken off
    bound = 1.01 * torch.finfo(dtype).eps / 2 * expected.abs() + 2**-20 * (size + rounded.abs().amax() * K)
    assert ((y_TN.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("tokens", [1, 20])
def test_the_operator(tokens: int) -> None:
    """Through the format, as a layer runs it."""
    _, tensors, layer = quantized(37, 90, int_spec(4, 32))
    x_TK = torch.randn(tokens, 90, generator=torch.Generator().manual_seed(0))
    blob = Triton().prepare(tensors, layer, torch.float32)
    fmt = format_named("int-group/1")
    y_TN = fmt.linear(x_TK, tensors, blob, layer, "triton")
    torch.testing.assert_close(y_TN, fmt.linear(x_TK, tensors, [], layer, "reference"), rtol=1e-5, atol=1e-5)
