"""How large things may be, run by Triton's interpreter: every dimension up to 4096, offsets beyond 2^31 elements."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.formats import Layer, format_named
from hf_quant.kernels._gemm.configs import Config
from hf_quant.kernels._gemm.launch import matmul
from hf_quant.kernels._gemm.operand import Weight, affine_ranges
from hf_quant.kernels._gemm.quantized import quantize
from hf_quant.kernels.int_group.gpu import Triton
from hf_quant.runtime.packed import refit
from hf_quant.spec import act_spec, int_spec

WORK = 1 << 22  # products of one example, so that it takes a second


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """(M, N, K) in 1 .. 4096, one of them as large as it likes, the others with room for its work."""
    left, found = WORK, {}
    for name in draw(st.permutations("MNK")):
        found[name] = draw(st.integers(1, min(4096, max(1, left))))
        left //= found[name]
        left = min(left, 1 << 9) if len(found) == 2 else left
    return found["M"], found["N"], found["K"]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shapes(),
    st.sampled_from((2, 3, 4, 8)),
    st.sampled_from((-1, 16, 32, 64, 100, 128, 256)),
    st.booleans(),
    st.sampled_from((torch.float16, torch.bfloat16)),
)
def test_products(shape: tuple[int, int, int], bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    M, N, K = shape
    spec, generator = int_spec(bits, group, symmetric=symmetric), torch.Generator().manual_seed(M * N + K)
    q = refit(torch.randn(N, K, generator=generator), spec)
    tensors, layer = format_named("int-group/1").pack(q), Layer((N, K), spec)
    x_MK, W_NK = torch.randn(M, K, generator=generator).to(dtype), q.dequantize(dtype).double()
    y_MN = Triton().run(x_MK, tensors, Triton().prepare(tensors, layer, dtype), layer)
    expected, size = x_MK.double() @ W_NK.T, (x_MK.double().square() @ W_NK.square().T).sqrt()
    bound = 1.01 * torch.finfo(dtype).eps / 2 * expected.abs() + 16 * 2**-24 * K**0.5 * size + 1e-6
    assert ((y_MN.double() - expected).abs() <= bound).all()


def far_apart(rows: int, K: int, dtype: torch.dtype) -> Tensor:
    """Rows more than 2^31 elements from the first to the last one; only their own pages are touched."""
    stride = (1 << 31) // (rows - 1) + 64
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        memory = torch.empty((rows - 1) * stride + K, dtype=dtype)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    x = memory.as_strided((rows, K), (stride, 1))
    return x.copy_(torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)))


@pytest.mark.skipif(sys.platform != "linux", reason="memory that is not touched costs nothing on Linux")
@pytest.mark.parametrize("config", [Config("vector", BM=1, BN=16), Config("tensor", BM=16, BN=16, splits=2)])
def test_tokens_far_apart(config: Config) -> None:
    N, K = 16, 64
    weight, generator = Weight((N, K), 4, K, ranges="scales", zero=8), torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
    blob = [weight.shuffle.pack(codes), *affine_ranges(torch.full((N, 1), 0.1), None, N, torch.float16)]
    x = far_apart(3, K, torch.float16)
    assert x.storage_offset() + 2 * x.stride(0) > 1 << 31
    near = x.contiguous()
    assert torch.equal(
        matmul(x, blob, weight, torch.float16, config=config), matmul(near, blob, weight, torch.float16, config=config)
    )
    codes_far, codes_near = quantize(x, act_spec(8)), quantize(near, act_spec(8))
    assert torch.equal(codes_far.values, codes_near.values)
    assert torch.equal(codes_far.scale, codes_near.scale)


@pytest.mark.skipif(sys.platform != "linux", reason="memory that is not touched costs nothing on Linux")
def test_experts_far_apart() -> None:
    """The words of the last expert begin beyond 2^31."""
    N, K, experts = 16, 64, 3
    weight, generator = Weight((N, K), 4, K, ranges="scales", zero=8), torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (experts, N, K), generator=generator, dtype=torch.uint8)
    words = torch.stack([weight.shuffle.pack(c) for c in codes])
    stride = (1 << 30) + 512
    torch.utils.deterministic.fill_uninitialized_memory = False
    far = torch.empty(2 * stride + words[0].numel(), dtype=torch.int32)
    torch.utils.deterministic.fill_uninitialized_memory = True
    apart = far.as_strided(words.shape, (stride, *words.stride()[1:])).copy_(words)
    scale = torch.full((experts, 1, N), 0.1)
    x, chosen = torch.randn(4, K, generator=generator), torch.tensor([[0, 2], [2, 1], [1, 0], [2, 2]])
    found, wanted = (matmul(x, [w, scale], weight, torch.float32, experts=chosen) for w in (apart, words))
    assert torch.equal(found, wanted)
