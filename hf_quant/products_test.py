"""Products in float32 where the CPU has none of bfloat16: the same weights, one rounding, either way."""

import copy
from contextlib import nullcontext

import pytest
import torch

from hf_quant import products


@pytest.mark.parametrize("native", [True, False])
def test_a_product_is_rounded_once(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64: within half a step of bfloat16, and what float32 sums of 300 add; one-hot rows to the bit."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: native)
    monkeypatch.setattr(products, "SLICE", 7 * 300)  # several slices, the last one shorter
    generator = torch.Generator().manual_seed(0)
    W_NK = torch.randn(40, 300, generator=generator).bfloat16()
    for count in (0, 1, products.FEW, products.FEW + 1, 40):
        x_TK = torch.randn(count, 300, generator=generator).bfloat16()
        y_TN, exact = products.product(x_TK, W_NK), x_TK.double() @ W_NK.double().T
        size = x_TK.double().abs() @ W_NK.double().abs().T
        assert y_TN.dtype == torch.bfloat16
        assert ((y_TN - exact).abs() <= 2**-8 * exact.abs() + 2**-18 * size).all()
    assert torch.equal(products.product(torch.eye(300).bfloat16(), W_NK), W_NK.T)
    assert torch.equal(products.product(torch.eye(40).bfloat16(), W_NK.T), W_NK)


def test_only_many_rows_of_bfloat16_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    few, many = (torch.ones(n, 2, dtype=torch.bfloat16) for n in (products.FEW, products.FEW + 1))
    assert products.operand(few) is few
    assert products.operand(many).dtype == torch.float32
    assert products.sums() == "float32"
    for x in (many.half(), many.double(), many.to("meta")):
        assert products.operand(x) is x
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    assert products.operand(many) is many


@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_are_not_ours_are_multiplied_so(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's values and gradients, each rounded once; other types are left alone."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    seen, plain = [], products.product
    monkeypatch.setattr(products, "product", lambda x, W, b=None: seen.append(x.shape) or plain(x, W, b))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 300, generator=generator).bfloat16().requires_grad_()
    layer, out = torch.nn.Linear(300, 40, bias=bias).bfloat16(), torch.randn(2, 9, 40, generator=generator).bfloat16()
    exact = copy.deepcopy(layer).double()
    with products.widened():
        y = layer(x)
        exact_y = exact(x.double())
    found = torch.autograd.grad(y, [x, *layer.parameters()], out)
    wanted = torch.autograd.grad(exact_y, [x, *exact.parameters()], out.double())
    assert y.shape == (2, 9, 40)
    for ours, theirs in zip((y, *found), (exact_y, *wanted), strict=True):
        assert ours.dtype == torch.bfloat16
        assert ((ours - theirs).abs() <= 2**-8 * theirs.abs() + 1e-4).all()
    assert seen == [(18, 300), (18, 40), (40, 18)]


def test_a_product_is_derived_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As curvature wants it."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    W = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    found = []
    for wide in (True, False):
        with products.widened() if wide else nullcontext():
            y = torch.nn.functional.linear(torch.ones(6, 16).bfloat16(), W).float().square().sum()
        (first,) = torch.autograd.grad(y, [W], create_graph=True)
        found.append(torch.autograd.grad(first.float().square().sum(), [W])[0].float())
    assert torch.allclose(*found, rtol=3e-2, atol=1e-2 * float(found[1].abs().max()))
