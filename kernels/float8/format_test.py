"""Bytes of the 8-bit float format, and what it refuses."""

import pytest
import torch

from hf_quant.formats import Layer, format_for, format_named
from hf_quant.grids import E4M3, E5M2, FloatGrid, Grid, MiniFloatGrid
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec, int_spec

FP8 = format_named("float8/1")
FLOAT = FloatGrid("float32")


def spec(grid: Grid = E4M3, block: tuple[int, int] = (1, -1)) -> Spec:
    return Spec(grid=grid, block=block, scale=FLOAT)


def test_the_bytes_are_sign_exponent_mantissa() -> None:
    """448 = 1.75 2^8 -> 0x7E; 1 -> 0x38; -2^-9, the smallest, -> 0x81; E5M2's 57344 -> 0x7B, 1 -> 0x3C."""
    packed = FP8.pack(refit(torch.tensor([[448.0, 1.0, -(2.0**-9), 0.0]]), spec()))
    assert packed["qweight"].dtype == torch.float8_e4m3fn
    assert packed["qweight"].view(torch.uint8).tolist() == [[0x7E, 0x38, 0x81, 0x00]]
    assert packed["scale"].tolist() == [[1.0]]
    packed = FP8.pack(refit(torch.tensor([[57344.0, 1.0]]), spec(E5M2)))
    assert packed["qweight"].view(torch.uint8).tolist() == [[0x7B, 0x3C]]


def test_mxfp8_scales_are_the_bytes_of_exponents() -> None:
    mx = Spec(grid=E4M3, block=(1, 32), scale=FloatGrid("float8_e8m0fnu"))
    packed = FP8.pack(refit(torch.cat((torch.full((1, 32), 448.0), torch.full((1, 32), 448 * 2.0**-7)), 1), mx))
    assert packed["scale"].tolist() == [[127, 120]]
    assert packed["qweight"].view(torch.uint8).unique().tolist() == [0x7E]


def test_blocks_of_128_by_128_have_a_scale_each() -> None:
    W = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    q = refit(W, spec(block=(128, 128)))
    layer = Layer((200, 300), q.spec)
    packed = FP8.pack(q)
    assert packed["scale"].shape == (2, 3)
    assert packed["scale"][1, 2].item() == pytest.approx(W[128:, 256:].abs().max().item() / 448)
    assert (FP8.weight(packed, layer, torch.float32) - W).abs().max() <= W.abs().max() / 448 * 16


def test_damage_is_found() -> None:
    layer = Layer((2, 8), spec())
    packed = FP8.pack(refit(torch.ones(2, 8), layer.weights))
    assert FP8.check(packed, layer) is None
    packed["qweight"].view(torch.uint8)[1, 3] = 0x7F
    assert FP8.check(packed, layer) == "qweight holds NaN or infinite values"


def test_it_is_chosen_and_what_it_does_not_hold_has_a_reason() -> None:
    assert format_for(Layer((4, 8), spec())) is FP8
    assert "float8_e4m3fn" in (FP8.holds(Layer((4, 8), int_spec(8))) or "")
    assert "float8_e4m3fn" in (FP8.holds(Layer((4, 8), spec(MiniFloatGrid(4, 3)))) or "")
    assert "static inputs" in (FP8.holds(Layer((4, 8), spec(), Spec(grid=E4M3, block=(1, -1)))) or "")
