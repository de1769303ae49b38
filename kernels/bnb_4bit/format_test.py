"""Bytes of the 4-bit formats, and what they refuse. Against bitsandbytes: plugins/grids/bitsandbytes_test.py."""

import pytest
import torch

from hf_quant.errors import UnsupportedSpec
from hf_quant.formats import Layer, format_named
from hf_quant.grids import DynamicGrid, FloatGrid, Grid, LevelGrid
from hf_quant.kernels.bnb_4bit.format import FP4, NF4
from hf_quant.qtensor import QTensor
from hf_quant.spec import Spec, act_spec

FLOAT = FloatGrid("float32")


def spec(levels: tuple[float, ...], block: int = 32, scale: Grid = FLOAT) -> Spec:
    return Spec(grid=LevelGrid(tuple(sorted(set(levels)))), block=(1, block), scale=scale)


def test_nf4_codes_are_ranks_and_the_first_is_in_the_high_nibble() -> None:
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    packed = format_named("bnb-nf4/1").pack(QTensor(codes, torch.ones(1, 1), None, spec(NF4), (1, 32)))
    assert packed["qweight"].tolist() == [[0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 2]


def test_fp4_codes_are_sign_exponent_mantissa() -> None:
    """Value of each code, from the bits: (1 + m / 2) 2^(e - 1) * 4 / 12 for e > 0 as bitsandbytes numbers them."""
    values = [0, 1 / 192, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
    weight = torch.tensor([[sign * v for sign in (1, -1) for v in values] * 2])
    grid = spec(FP4).grid
    fmt = format_named("bnb-fp4/1")
    packed = fmt.pack(QTensor(grid.encode(weight), torch.ones(1, 1), None, spec(FP4), (1, 32)))
    # -0.0 is written as code 0, the rest in order
    assert packed["qweight"].tolist() == [[0x01, 0x23, 0x45, 0x67, 0x09, 0xAB, 0xCD, 0xEF] * 2]
    packed["qweight"][0, 4] = 0x89  # bitsandbytes' second zero reads as zero
    assert torch.equal(fmt.weight(packed, Layer((1, 32), spec(FP4)), torch.float32), weight)


def test_double_quantization_decodes_by_its_formula() -> None:
    double = spec(NF4, scale=DynamicGrid())
    layer, generator = Layer((20, 480), double), torch.Generator().manual_seed(0)
    tensors = {
        "qweight": torch.randint(0, 256, (20, 240), dtype=torch.uint8, generator=generator),
        "scale": torch.randint(0, 256, (20, 15), dtype=torch.uint8, generator=generator),
        "nested_scale": torch.tensor([0.5, 2.0]),  # 300 scales: 256 and 44
        "nested_offset": torch.tensor([3.0]),
    }
    fmt = format_named("bnb-nf4/1")
    assert fmt.check(tensors, layer) is None
    q = fmt.unpack(tensors, layer)
    flat = DynamicGrid().decode(tensors["scale"]).flatten()
    assert torch.equal(q.scale.flatten(), torch.cat((flat[:256] * 0.5, flat[256:] * 2)) + 3)
    again = fmt.pack(q)
    assert all(torch.equal(again[n], t) for n, t in tensors.items())


def test_scales_without_their_codes_cannot_be_packed() -> None:
    q = QTensor(torch.zeros(1, 32, dtype=torch.uint8), torch.ones(1, 1), None, spec(NF4, scale=DynamicGrid()), (1, 32))
    with pytest.raises(UnsupportedSpec, match="need a solver"):
        format_named("bnb-nf4/1").pack(q)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Layer((4, 96), spec(NF4, 64)), "cross row ends"),
        (Layer((4, 96), spec(NF4, 48)), "bitsandbytes has"),
        (Layer((4, 64), spec(FP4)), "levels of bnb-nf4/1"),
        (Layer((4, 64), spec(NF4, scale=FloatGrid("bfloat16"))), "float32"),
        (Layer((4, 64), spec(NF4), act_spec(8)), "inputs"),
    ],
)
def test_what_it_does_not_hold_has_a_reason(layer: Layer, reason: str) -> None:
    assert reason in (format_named("bnb-nf4/1").holds(layer) or "")


def test_dynamic_grid() -> None:
    grid, codes = DynamicGrid(), torch.arange(256).to(torch.uint8)
    values = grid.decode(codes)
    assert torch.equal(grid.encode(values), codes)
    assert values[0] == pytest.approx(-0.9929687)
    assert values[127] == 0
    assert values[255] == 1
    assert bool((values.diff() > 0).all())
    x = torch.linspace(-1.1, 1.1, 2001)
    nearest = (x[:, None] - values).abs().amin(1)
    torch.testing.assert_close((grid.decode(grid.encode(x)) - x).abs(), nearest, rtol=0, atol=1e-7)
