"""On a GPU: shapes up to 4096, offsets beyond 2^31, CUDA graphs, compilation. And hf_quant/every_format_test.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.formats import Layer, format_named
from hf_quant.grids import E4M3, FloatGrid
from hf_quant.kernels._gemm.operand import Weight, affine_ranges
from hf_quant.kernels.int_group.gpu import Triton
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec, act_spec, int_spec

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def whole_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's products add their parts in float32, as ours do."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)


def prepared(N: int, K: int, spec: Spec, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], list[Tensor], Layer]:
    """(decoded weight, canonical tensors, blob, layer)."""
    W_NK = torch.randn(N, K, generator=torch.Generator(GPU).manual_seed(N + K), device=GPU)
    q, layer = refit(W_NK, spec), Layer((N, K), spec)
    tensors = format_named("int-group/1").pack(q)
    return q.dequantize(dtype), tensors, Triton().prepare(tensors, layer, dtype), layer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.sampled_from((1, 2, 4, 5, 17, 64, 100, 256, 1000, 4096)),
    st.sampled_from((-1, 16, 32, 100, 128)),
    st.booleans(),
)
def test_products(bits: int, dtype: torch.dtype, N: int, K: int, M: int, group: int, symmetric: bool) -> None:
    from hf_quant.kernels._gemm.configs import kind
    from hf_quant.kernels._gemm.launch import constants

    spec = int_spec(bits, group, symmetric=symmetric)
    W_NK, tensors, blob, layer = prepared(N, K, spec, dtype)
    config = Triton().config(blob, layer, dtype, M)
    if constants(Triton().weight(blob, layer), dtype, config, kind(GPU))["AFTER"]:  # then no weight is rounded
        W_NK = format_named("int-group/1").weight(tensors, layer, torch.float32)
    x_MK = torch.randn(M, K, device=GPU).to(dtype)
    y_MN = Triton().run(x_MK, tensors, blob, layer).double()
    expected = x_MK.double() @ W_NK.double().T
    size = (x_MK.double().square() @ W_NK.double().square().T).sqrt()
    bound = 1.01 * torch.finfo(dtype).eps / 2 * expected.abs() + 16 * 2**-24 * K**0.5 * size + 1e-6
    assert ((y_MN - expected).abs() <= bound).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from((-1, 16, 32, 100)), st.booleans())
def test_one_hot_is_the_weight(bits: int, dtype: torch.dtype, N: int, K: int, group: int, symmetric: bool) -> None:
    W_NK, tensors, blob, layer = prepared(N, K, int_spec(bits, group, symmetric=symmetric), dtype)
    one_hot = torch.eye(K, dtype=dtype, device=GPU)
    for rows in (1, 20, 200, K):
        assert torch.equal(Triton().run(one_hot[:rows], tensors, blob, layer), W_NK.T[:rows])


@pytest.mark.parametrize("tokens", [3, 40])
def test_parts_come_in_any_order(tokens: int) -> None:
    """Hundreds of launches side by side on two streams, K in parts: every result has the same bits."""
    _, tensors, blob, layer = prepared(512, 4096, int_spec(4, 128), torch.bfloat16)
    x_MK = torch.randn(tokens, 4096, device=GPU).bfloat16()
    wanted, streams = Triton().run(x_MK, tensors, blob, layer), [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for i in range(400):
        with torch.cuda.stream(streams[i % 2]):
            results.append(Triton().run(x_MK, tensors, blob, layer))
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in results)


@pytest.mark.parametrize("tokens", [3, 40])
def test_tokens_far_apart(tokens: int) -> None:
    """Offsets beyond 2^31 elements on the way in."""
    N, K, stride = 64, 128, (1 << 31) // (tokens - 1) + 128
    W_NK, tensors, blob, layer = prepared(N, K, int_spec(4, 32), torch.float16)
    memory = torch.empty((tokens - 1) * stride + K, dtype=torch.float16, device=GPU)
    x_MK = memory.as_strided((tokens, K), (stride, 1)).normal_()
    torch.testing.assert_close(
        Triton().run(x_MK, tensors, blob, layer), x_MK.contiguous() @ W_NK.T, rtol=2e-3, atol=1e-2
    )


def test_a_result_of_more_than_2_to_the_31() -> None:
    """Offsets beyond 2^31 elements on the way out."""
    from hf_quant.kernels._gemm.configs import Config
    from hf_quant.kernels._gemm.launch import matmul

    N, K, M = 4096, 64, (1 << 19) + 100
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=GPU)
    weight = Weight((N, K), 4, K, ranges="scales", zero=8)
    blob = [weight.shuffle.pack(codes), *affine_ranges(torch.full((N, 1), 0.1, device=GPU), None, N, torch.float16)]
    x_MK = torch.randn(M, K, device=GPU).half()
    y_MN = matmul(x_MK, blob, weight, torch.float16, config=Config("tensor", BM=64, BN=64))
    expected = x_MK[-200:] @ ((codes.float() - 8) * torch.tensor(0.1, device=GPU)).half().T
    torch.testing.assert_close(y_MN[-200:], expected, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("tokens", [1, 16, 100, 600])
@pytest.mark.parametrize("inputs", [None, act_spec(8)])
def test_graphs_and_compilation(tokens: int, inputs: Spec | None) -> None:
    """One captured launch serves new tokens; one node under torch.compile."""
    _, tensors, _, layer = prepared(200, 256, int_spec(4, 256), torch.bfloat16)
    layer, fmt = Layer(layer.shape, layer.weights, inputs), format_named("int-group/1")
    blob = Triton().prepare(tensors, layer, torch.bfloat16)

    def f(x: Tensor) -> Tensor:
        return fmt.linear(x, tensors, blob, layer, "triton") * 2

    x, other = torch.randn(2, tokens, 256, device=GPU).bfloat16()
    wanted, wanted_other = f(x), f(other)
    graph, static = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        y = f(static)
    graph.replay()
    assert torch.equal(y, wanted)
    static.copy_(other)
    graph.replay()
    assert torch.equal(y, wanted_other)
    assert torch.equal(torch.compile(f, fullgraph=True)(x), wanted)


@pytest.mark.parametrize("block", [(1, -1), (-1, -1), (128, 128)])
@pytest.mark.parametrize("shape", [(300, 512), (320, 1024)])
def test_float8(shape: tuple[int, int], block: tuple[int, int]) -> None:
    fmt = format_named("float8/1")
    tokens = Spec(grid=E4M3, block=(1, -1), index="token", range="dynamic", scale=FloatGrid("float32"))
    layer = Layer(shape, Spec(grid=E4M3, block=block, scale=FloatGrid("float32")), tokens)
    tensors = fmt.pack(refit(torch.randn(layer.shape, device=GPU), layer.weights))
    kernel = next(k for k in fmt.kernels if k.name == "triton-float8")
    x = torch.randn(70, shape[1], device=GPU).bfloat16()
    y = kernel.run(x, tensors, kernel.prepare(tensors, layer, x.dtype), layer)
    # on the CPU: torch divides by a number there, and multiplies by its reciprocal on a GPU
    expected = fmt.reference(x.float().cpu(), {n: t.cpu() for n, t in tensors.items()}, layer)
    size = (x.float().cpu().square() @ fmt.weight(tensors, layer, torch.float32).cpu().square().T).sqrt()
    bound = 2**-8 * expected.abs() + 3 * 2**-13 * shape[1] ** 0.5 * size  # 13 bits of the largest product are kept
    assert ((y.cpu().float() - expected).abs() <= bound).all()
    assert (y.cpu().float() - expected).square().mean() < 1e-4 * expected.square().mean()
