"""Products in float32 where the CPU has none of bfloat16: the same weights, one rounding, either way."""

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


def test_layers_that_are_not_ours_are_multiplied_so_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values but for the order of their sums; training keeps torch's product, other types do, too."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    seen, plain = [], products.product
    monkeypatch.setattr(products, "product", lambda x, W, b: seen.append(x.shape) or plain(x, W, b))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 300, generator=generator).bfloat16()
    for bias in (True, False):
        layer = torch.nn.Linear(300, 40, bias=bias).bfloat16()
        with torch.no_grad():
            exact = layer.double()(x.double())
            with products.widened():
                y = layer.bfloat16()(x)
                layer.float()(x.float())
        assert y.shape == (2, 9, 40)
        assert y.dtype == torch.bfloat16
        assert ((y - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()
    assert seen == [(18, 300)] * 2
    with products.widened():
        layer.bfloat16()(x).sum().backward()
    assert layer.weight.grad is not None
    assert len(seen) == 2
