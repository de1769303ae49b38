"""The CPU kernels of `int-group/1` print what they hold; on other data, hf_quant/every_format_test.py compares them."""

from dataclasses import replace

import pytest
import torch

from hf_quant.formats import Layer, format_named
from hf_quant.kernels._cpu import native
from hf_quant.kernels.int_group.cpu import INT4_TOKENS, INT8_TOKENS, Int4Cpu
from hf_quant.kernels.int_group.native import Native
from hf_quant.qtensor import QTensor
from hf_quant.runtime.explain import explain
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec, int_spec

FORMAT = format_named("int-group/1")


@pytest.mark.parametrize("rows", [32, 128])  # beside whole blocks, and two of them
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_narrow_codes_are_codes_of_four_bits(bits: int, group: int, symmetric: bool, rows: int) -> None:
    """One-hot inputs print the weight, bit for bit: scales of powers of two, so that bfloat16 rounds nothing."""
    shape, spec = (rows, 192), int_spec(bits, group, symmetric=symmetric)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    blocks = spec.blocks(shape)
    scale = torch.exp2(torch.randint(-9, 3, blocks, generator=generator).float())
    zero = None if symmetric else torch.randint(0, 1 << bits, blocks, generator=generator).float()
    q, layer = QTensor(codes, scale, zero, spec, shape), Layer(shape, spec)
    tensors = FORMAT.pack(q)
    assert Int4Cpu().supports(layer, torch.device("cpu"), torch.bfloat16) is None
    blob = Int4Cpu().prepare(tensors, layer, torch.bfloat16)
    assert blob[0].nbytes == codes.numel() // 2
    one_hot = torch.eye(max(INT4_TOKENS + 1, 192), 192).bfloat16()
    few = torch.cat([Int4Cpu().run(x, tensors, blob, layer) for x in one_hot.split(48)])
    many = Int4Cpu().run(one_hot, tensors, blob, layer)
    assert torch.equal(few[:192].T.float(), q.dequantize())
    assert torch.equal(many[:192].T.float(), q.dequantize())


@pytest.mark.parametrize("scale", ["bfloat16", "float16", "float32"])
def test_many_tokens_see_the_weight_of_the_reference(scale: str) -> None:
    """Whatever type the scales have: a product that is rounded to float32 and then to bfloat16 is the definition."""
    shape, spec = (128, 192), int_spec(4, 32, scale=scale)
    q = refit(torch.randn(shape, generator=torch.Generator().manual_seed(0)), spec)
    layer, tensors = Layer(shape, spec), FORMAT.pack(q)
    blob = Int4Cpu().prepare(tensors, layer, torch.bfloat16)
    y_TN = Int4Cpu().run(torch.eye(max(INT4_TOKENS + 1, 192), 192).bfloat16(), tensors, blob, layer)
    assert torch.equal(y_TN[:192].T, FORMAT.weight(tensors, layer, torch.bfloat16))


def test_wider_codes_are_refused() -> None:
    layer = Layer((16, 64), int_spec(5, 32))
    assert "at most 4 bits" in str(Int4Cpu().supports(layer, torch.device("cpu"), torch.bfloat16))
    assert Int4Cpu().supports(replace(layer, weights=int_spec(1, 32)), torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize(("N", "K", "group"), [(80, 96, 32), (48, 256, 128), (5632, 384, 64), (32, 320, -1)])
def test_the_gradient_is_of_the_same_weight(N: int, K: int, group: int) -> None:
    """No dense weight is made: whole groups of columns at a time, to the bit the columns of the reference's product."""
    generator = torch.Generator().manual_seed(0)
    spec = int_spec(4, group)
    q = refit(torch.randn(N, K, generator=generator), spec)
    layer = Layer((N, K), spec)
    tensors = FORMAT.pack(q)
    blob = Int4Cpu().prepare(tensors, layer, torch.bfloat16)
    grad_TN = torch.randn(5, N, generator=generator).bfloat16()
    found = Int4Cpu().gradient(grad_TN, {n: t for n, t in tensors.items() if n != "qweight"}, blob, layer)
    want = grad_TN.float() @ q.dequantize(torch.bfloat16).float()
    torch.testing.assert_close(found.float(), want, rtol=2**-8, atol=1e-4 * float(want.abs().max()))
    eye = torch.eye(N, dtype=torch.bfloat16)[:40]
    same = Int4Cpu().gradient(eye, {n: t for n, t in tensors.items() if n != "qweight"}, blob, layer)
    assert torch.equal(same, q.dequantize(torch.bfloat16)[:40])


@pytest.mark.parametrize(("spec", "upto"), [(int_spec(4, 32), INT4_TOKENS), (int_spec(8, symmetric=True), INT8_TOKENS)])
def test_explain_says_where_it_changes_over(spec: Spec, upto: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "no compiler")
    q = refit(torch.randn(64, 64), spec)
    model = torch.nn.Sequential(QuantLinear.from_qtensor(q, FORMAT, dtype=torch.bfloat16))
    (row,) = explain(model)
    assert [last for last, _ in row.runs] == [upto, None]
    assert all("product" in what for _, what in row.runs)


@pytest.mark.skipif(native.why_not() is not None, reason=f"no native product: {native.why_not()}")
@pytest.mark.parametrize("spec", [int_spec(b, 24, symmetric=s) for b in (1, 3, 4, 5, 8) for s in (True, False)])
def test_the_native_product_prints_the_weight_and_its_gradient(spec: Spec) -> None:
    """One-hot inputs, few and many: float32 keeps `code - zero` and rounds the scaled value once, as the reference."""
    layer, kernel = Layer((40, 192), spec), Native()
    tensors = FORMAT.pack(refit(torch.randn(40, 192, generator=torch.Generator().manual_seed(1)), spec))
    blob, W_NK = kernel.prepare(tensors, layer, torch.bfloat16), FORMAT.weight(tensors, layer, torch.bfloat16)
    kept, eye = {n: t for n, t in tensors.items() if n != "qweight"}, torch.eye(192).bfloat16()
    few = torch.cat([kernel.run(x, kept, blob, layer) for x in eye.split(5)])
    assert torch.equal(few.T, W_NK)
    assert torch.equal(kernel.run(eye, kept, blob, layer).T, W_NK)
    assert torch.equal(kernel.gradient(torch.eye(40).bfloat16(), kept, blob, layer), W_NK)
