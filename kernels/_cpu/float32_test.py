"""Models in float32 run on the product: where it multiplies bfloat16, three times or on a weight made dense."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_quant.formats import Layer, format_for
from hf_quant.grids import E4M3, CodebookGrid, FloatGrid, LevelGrid, MiniFloatGrid
from hf_quant.kernels._cpu import native
from hf_quant.kernels._cpu.float32 import in_terms
from hf_quant.kernels._cpu.kernel import NativeKernel
from hf_quant.kernels.bnb_4bit.format import NF4
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec, int_spec

CPU = torch.device("cpu")
SPECS = {
    **{f"{bits} bits": int_spec(bits, 48) for bits in (2, 3, 4, 8)},
    "NF4": Spec(grid=LevelGrid(NF4), block=(1, 48), scale=FloatGrid("float32")),
    "MXFP4": Spec(grid=MiniFloatGrid(2, 1), block=(1, 32), scale=FloatGrid("float8_e8m0fnu")),
    "FP8": Spec(grid=E4M3, block=(1, -1)),
    "MXFP6": Spec(grid=MiniFloatGrid(3, 2), block=(1, 32), scale=FloatGrid("float8_e8m0fnu")),
}


def native_kernel(layer: Layer) -> NativeKernel:
    return next(k for k in format_for(layer).kernels if isinstance(k, NativeKernel))


@pytest.mark.skipif(native.why_not() is not None, reason="no product on this processor")
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_one_hot_inputs_print_the_float32_weight(name: str, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tiled:
        monkeypatch.setattr(native, "tiled", lambda: False)
    layer = Layer((40, 192), SPECS[name])
    fmt, kernel = format_for(layer), native_kernel(layer)
    tensors = fmt.pack(refit(torch.randn(40, 192, generator=torch.Generator().manual_seed(0)), layer.weights))
    assert kernel.supports(layer, CPU, torch.float32) is None
    blob, W_NK = kernel.prepare(tensors, layer, torch.float32), fmt.weight(tensors, layer, torch.float32)
    for tokens in (1, 2, 4, 192):
        y_KN = torch.cat([kernel.run(x, tensors, blob, layer) for x in torch.eye(192).split(tokens)])
        assert torch.equal(y_KN.T, W_NK)
    x_TK = torch.randn(13, 192, generator=torch.Generator().manual_seed(1))
    y_TN, exact = kernel.run(x_TK, tensors, blob, layer), x_TK.double() @ W_NK.double().T
    assert ((y_TN - exact).abs() <= 2**-20 * (x_TK.abs().double() @ W_NK.abs().double().T)).all()


def test_levels_that_lie_in_bfloat16_are_for_bfloat16() -> None:
    layer = Layer((16, 128), Spec(grid=CodebookGrid(4), block=(1, -1)))
    assert "fast in bfloat16 only" in str(native_kernel(layer).supports(layer, CPU, torch.float32))


@given(
    st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100), min_size=1, max_size=8)
)
def test_three_numbers_of_bfloat16_are_one_of_float32(numbers: list[float]) -> None:
    x_TK = torch.tensor([numbers])
    high, mid, low = in_terms(x_TK).double()
    assert ((high + mid + low - x_TK.double()).abs() <= 2**-24 * x_TK.abs().double() + 1e-38).all()
