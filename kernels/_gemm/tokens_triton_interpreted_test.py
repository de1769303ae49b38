"""Quantization of tokens, the Hadamard transform and 8-bit products, run by Triton's interpreter."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.grids import E4M3, FloatGrid
from hf_quant.kernels._gemm.configs import Config
from hf_quant.kernels._gemm.launch import Tokens
from hf_quant.kernels._gemm.quantized import Range, Transform, quantize, rotate, scaled_matmul
from hf_quant.qtensor import from_extremes
from hf_quant.runtime.activation import pack_input, quantize_input
from hf_quant.spec import Spec, act_spec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = Spec(grid=E4M3, block=(1, -1), index="token", range="dynamic", scale=FloatGrid("float32"))


def sylvester(n: int) -> torch.Tensor:
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.kron(torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64), H)
    return H


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.one_of(st.builds(act_spec, st.integers(2, 8), static=st.booleans(), symmetric=st.booleans()), st.just(FLOATS)),
    st.integers(0, 5),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.sampled_from((1e-3, 1.0, 300.0)),
)
def test_codes_are_those_of_the_reference(spec: Spec, M: int, K: int, dtype: torch.dtype, size: float) -> None:
    """Bit for bit: codes, scales, zero points; a row of zeros among them; rows with a stride."""
    x_MK = (size * torch.randn(M, 2 * K, generator=torch.Generator().manual_seed(K)) ** 3).to(dtype)[:, ::2]
    x_MK[:1] = 0
    static, tensors = None, {}
    if spec.range == "static":
        tensors = pack_input(*from_extremes(x_MK.float().amin() if M else torch.tensor(-1.0), torch.tensor(size), spec))
        static = Range(tensors["input_scale"], tensors.get("input_zero_point"))
    found, wanted = quantize(x_MK, spec, static), quantize_input(x_MK, spec, tensors)
    shift = 0
    if spec is FLOATS:
        assert torch.equal(found.values.view(torch.uint8) & 0x7F, wanted.codes & 0x7F)
        assert torch.equal(found.values.float(), spec.grid.decode(wanted.codes))
    else:
        shift = 128 if spec.grid.high > 127 else 0
        assert torch.equal(found.values.float() + shift, spec.grid.decode(wanted.codes))
    assert torch.equal(found.scale, wanted.scale.expand(M, 1)[:, 0])
    if wanted.zero is not None:
        assert found.zero is not None
        assert torch.equal(found.zero + shift, wanted.zero.expand(M, 1)[:, 0])


def test_every_float8() -> None:
    """Each finite byte, the midpoints between neighbours and what lies around them, with a static scale of 1."""
    bytes_ = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = bytes_[bytes_.isfinite()].sort().values
    middle = (values[1:] + values[:-1]) / 2
    x = torch.cat((values, middle, middle * (1 + 2**-20), middle * (1 - 2**-20)))[None]
    found = quantize(x, FLOATS, Range(torch.ones(1)))
    assert torch.equal(found.values.float(), x.to(torch.float8_e4m3fn).float())


def test_the_range_of_a_step_is_looked_up() -> None:
    """Per-timestep scales: an entry of a table, named by a tensor, so that a graph can be replayed at another step."""
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    scale, zero, spec = torch.tensor([0.1, 0.02, 0.3]), torch.tensor([3, 100, 255]).int(), act_spec(8, symmetric=False)
    for step in (torch.tensor([0, 0, 0]), torch.tensor([2, 0, 1])):  # one sample, or one a token
        found = quantize(x, spec, Range(scale, zero, step))
        expected = (x / scale[step, None] + zero[step, None]).round().clamp(0, 255)
        assert torch.equal(found.values.float() + 128, expected)
        assert torch.equal(found.scale, scale[step])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.sampled_from((1, 2, 8, 64, 256)), st.integers(1, 3), st.integers(0, 3), st.sampled_from(DTYPES), st.booleans()
)
def test_hadamard(size: int, blocks: int, M: int, dtype: torch.dtype, signed: bool) -> None:
    K = size * blocks
    generator = torch.Generator().manual_seed(K)
    x = torch.randn(M, K, generator=generator).to(dtype)
    signs = (torch.randint(0, 2, (K,), generator=generator) * 2 - 1).float() if signed else None
    expected = x.double() * (1 if signs is None else signs)
    expected = (expected.reshape(M, blocks, size) @ (sylvester(size) / size**0.5)).reshape(M, K)
    y = rotate(x, Transform(size, signs))
    assert y.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + 2**-21 * x.double().norm(dim=1, keepdim=True)
    assert ((y.double() - expected).abs() <= 1.01 * bound).all()
    if M:
        fused, apart = (
            quantize(x, act_spec(8), None, Transform(size, signs)),
            quantize_input(expected.float(), act_spec(8), {}),
        )
        assert (fused.values.int() - (apart.codes.int() - 128)).abs().max() <= 1  # ties may fall either way
        torch.testing.assert_close(fused.scale[:, None], apart.scale, rtol=1e-5, atol=0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.sampled_from((0, 1, 5, 20)),
    st.integers(1, 70),
    st.integers(1, 400),
    st.sampled_from((-1, 32, 128)),
    st.sampled_from((torch.int8, torch.float8_e4m3fn)),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from((None, Config("tensor", BM=16, BN=32, splits=3))),
)
def test_products(
    M: int, N: int, K: int, block: int, kind: torch.dtype, shifted: bool, dtype: torch.dtype, config: Config | None
) -> None:
    """int8 and float8, one scale a row or one a block of K, zero points, K in parts."""
    g = torch.Generator().manual_seed(N * K)
    if kind == torch.int8:
        x, w = (torch.randint(-128, 128, s, generator=g).to(kind) for s in ((M, K), (N, K)))
    else:
        x, w = ((30 * torch.randn(s, generator=g)).to(kind) for s in ((M, K), (N, K)))
    width = K if block == -1 else block
    scale_GN = torch.rand(-(-K // width), N, generator=g) + 0.5
    W = w.double() * scale_GN.double().T[:, torch.arange(K) // width]
    sx = 1e-3 * (torch.rand(M, generator=g) + 0.1)  # float16 holds the result
    zero = torch.randint(-128, 128, (M,), generator=g).float() if shifted else None
    y = scaled_matmul(
        Tokens(x, sx, zero), w, scale_GN, width, dtype, row_sums=W.sum(1).float() if shifted else None, config=config
    )
    shift = 0 if zero is None else zero.double()[:, None]
    expected = (x.double() - shift) @ W.T * sx.double()[:, None]
    size = ((x.double().abs() + abs(shift)) @ W.abs().T) * sx.double()[:, None]
    assert y.dtype == dtype
    assert (
        (y.double() - expected).abs() <= 1.01 * torch.finfo(dtype).eps / 2 * expected.abs() + 2**-20 * size + 1e-7
    ).all()
