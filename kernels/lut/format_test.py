"""Bytes of the table formats, written out by hand; and the fit of stored codebooks against an exhaustive search."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.codebooks import fit_codebooks
from hf_quant.errors import ConfigError, UnsupportedSpec
from hf_quant.formats import Layer, format_for, format_named
from hf_quant.grids import E4M3, E5M2, CodebookGrid, FloatGrid, IntGrid, LevelGrid, MiniFloatGrid, grid_from_json
from hf_quant.grids import grid_to_json as to_json
from hf_quant.qtensor import QTensor
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.solver import Nearest

E2M1 = MiniFloatGrid(2, 1)
MXFP4 = Spec(grid=E2M1, block=(1, 32), scale=FloatGrid("float8_e8m0fnu"))
NVFP4 = Spec(grid=E2M1, block=(1, 16), scale=FloatGrid("float8_e4m3fn"), tensor_scale=True)
LUT, CODEBOOK = format_named("lut-group/1"), format_named("codebook-group/1")


def unsigned(words: Tensor) -> list[list[int]]:
    return (words.long() & 0xFFFFFFFF).tolist()


def test_e2m1_is_the_table_of_ocp_and_two_codes_make_a_byte_the_first_below() -> None:
    """compressed-tensors: 0.5, 1.0 -> byte 0x21; negative values have the fourth bit."""
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert E2M1.table().flatten().tolist() == values + [-v for v in values]
    row = torch.tensor([[0.5, 1.0, -0.5, 6.0, -6.0, 0.0, 3.0, 1.5] * 4])
    packed = LUT.pack(Nearest().solve(row, MXFP4, AbsMaxRange(), None))
    assert packed["qweight"].view(torch.uint8)[0, :4].tolist() == [0x21, 0x79, 0x0F, 0x35]
    assert packed["scale"].tolist() == [[127]]  # 2^0
    assert packed["scale"].dtype == torch.uint8


def test_nvfp4_multiplies_two_scales() -> None:
    """code 0x7 = 6, scale byte 0x38 = 1.0, tensor scale 0.25 -> 1.5; the largest weight has the largest of both."""
    layer = Layer((1, 16), NVFP4)
    tensors = {
        "qweight": torch.tensor([[0x00000007, 0]], dtype=torch.int32),
        "scale": torch.tensor([[0x38]], dtype=torch.uint8).view(torch.float8_e4m3fn),
        "tensor_scale": torch.tensor([0.25]),
    }
    assert LUT.check(tensors, layer) is None
    assert LUT.weight(tensors, layer, torch.float32).tolist() == [[1.5] + [0.0] * 15]
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    q = refit(W, NVFP4)
    assert q.tensor_scale is not None
    assert q.tensor_scale.item() == pytest.approx(W.abs().max().item() / (448 * 6))
    assert q.scale.max() == 448
    assert (q.dequantize() - W).abs().max() < 0.2 * W.abs().max()
    assert 8 * sum(t.numel() * t.element_size() for t in LUT.pack(q).values()) == 8 * 64 * 4 + 8 * 4 * 8 + 32


def test_codes_that_are_no_values_are_found() -> None:
    spec = Spec(grid=LevelGrid((-1.0, 0.0, 2.0)), block=(1, -1))
    packed = LUT.pack(Nearest().solve(torch.tensor([[-1.0, 2.0, 0.0, 0.0]]), spec, AbsMaxRange(), None))
    assert unsigned(packed["qweight"]) == [[0b01011000]]
    assert LUT.check(packed, Layer((1, 4), spec)) is None
    packed["qweight"][0, 0] = 0b11
    assert "no value" in (LUT.check(packed, Layer((1, 4), spec)) or "")
    packed = LUT.pack(Nearest().solve(torch.ones(1, 32), MXFP4, AbsMaxRange(), None))
    packed["scale"][0, 0] = 255
    assert "NaN" in (LUT.check(packed, Layer((1, 32), MXFP4)) or "")


def test_a_codebook_of_three_bits_costs_three_bits_and_its_levels() -> None:
    spec = Spec(grid=CodebookGrid(3), block=(1, 32), scale=FloatGrid("float16"))
    levels = torch.tensor([-3.0, -2, -1, 0, 1, 2, 3, 4])
    codes = (torch.arange(64) % 8).to(torch.uint8).reshape(1, 64)
    book = torch.stack((levels, levels * 10)).reshape(1, 2, 8)
    q = QTensor(codes, torch.ones(1, 2), None, spec, (1, 64), codebook=book)
    packed = CODEBOOK.pack(q)
    assert unsigned(packed["qweight"])[0][:3] == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]  # 76543210 in octal, repeated
    assert packed["codebook"].shape == (1, 16)
    assert packed["codebook"].dtype == torch.float16
    assert q.dequantize().tolist() == [[-3, -2, -1, 0, 1, 2, 3, 4] * 4 + [-30, -20, -10, 0, 10, 20, 30, 40] * 4]
    assert 8 * sum(t.numel() * t.element_size() for t in packed.values()) == 64 * 3 + 2 * 8 * 16


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (int_spec(4), "table"),
        (Spec(grid=E2M1, scale=E2M1), "float type"),
        (Spec(grid=IntGrid(4), zero="int"), "table"),
        (Spec(grid=CodebookGrid(4)), "table"),
        (Spec(grid=E2M1, index="timestep"), "nothing but the block"),
    ],
)
def test_what_lut_group_does_not_hold_has_a_reason(spec: Spec, reason: str) -> None:
    assert reason in (LUT.holds(Layer((8, 64), spec)) or "")


def test_what_codebook_group_does_not_hold_has_a_reason() -> None:
    for spec, reason in (
        (Spec(grid=E2M1), "codebooks of their own"),
        (Spec(grid=CodebookGrid(4), scale=FloatGrid("float8_e4m3fn")), "16 bits"),
        (Spec(grid=CodebookGrid(4), tensor_scale=True), "carry the scale"),
    ):
        assert reason in (CODEBOOK.holds(Layer((8, 64), spec)) or "")
    assert format_for(Layer((8, 64), Spec(grid=CodebookGrid(4)))) is CODEBOOK
    assert "fitted" in (Nearest().refuses(Spec(grid=CodebookGrid(4))) or "")
    with pytest.raises(UnsupportedSpec, match="fitted"):
        CodebookGrid(4).encode(torch.ones(3))


MINI = [MiniFloatGrid(e, m) for e in range(1, 8) for m in range(8 - e)] + [E4M3, E5M2]


@pytest.mark.parametrize("grid", MINI, ids=str)
def test_a_small_float_is_the_nearest_one_and_its_code_its_bits(grid: MiniFloatGrid) -> None:
    table = grid.table().flatten()
    codes = torch.arange(len(table))[table.isfinite()].to(torch.uint8)
    assert grid.encode(grid.decode(codes)).equal(codes)
    values = grid.decode(codes)
    assert values.amax() == grid.high
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * grid.high / 3
    x = torch.cat((x, x * 2.0**-6, values.unique()[1:] / 2 + values.unique()[:-1] / 2))
    nearest = (x.double()[:, None].clamp(-grid.high, grid.high) - values.double()).abs().amin(1)
    assert (grid.decode(grid.encode(x)).double() - x.double().clamp(-grid.high, grid.high)).abs().equal(nearest)
    assert grid_from_json(to_json(grid)) == grid


@pytest.mark.parametrize(("grid", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)])
def test_codes_of_eight_bits_are_torchs_bytes(grid: MiniFloatGrid, dtype: torch.dtype) -> None:
    assert grid.bits == 8
    every = torch.arange(256).to(torch.uint8)
    assert torch.equal(every.view(dtype).float().nan_to_num(7, 7, 7), grid.decode(every).nan_to_num(7))
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)).clamp(-4, 4) ** 5
    x = x.clamp(-grid.high, grid.high)
    assert torch.equal(x.to(dtype).view(torch.uint8), grid.encode(x))


def test_impossible_small_floats() -> None:
    for e, m, top in ((0, 3, None), (5, 3, None), (2, -1, None), (2, 1, 5.0), (1.0, 2, None)):
        with pytest.raises(ConfigError):
            MiniFloatGrid(e, m, top)  # type: ignore[arg-type]


def cost(x: Tensor, w: Tensor, levels: Tensor) -> float:
    return float((w * (x[:, None] - levels).square().amin(1)).sum())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.booleans())
def test_two_levels_are_the_best_two(seed: int, weighted: bool) -> None:
    """One-dimensional clusters are intervals: of all ways to cut the sorted values in two, none is better."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 12, generator=g)
    w = torch.rand(1, 12, generator=g) if weighted else torch.ones(1, 12)
    spec = Spec(grid=CodebookGrid(1), block=(1, -1), scale=FloatGrid("float32"))
    q = fit_codebooks(x, spec, w)
    assert q.codebook is not None
    order = x[0].argsort()
    s, u = x[0][order], w[0][order]
    cuts = [torch.stack([(s[p] * u[p]).sum() / u[p].sum() for p in (slice(0, i), slice(i, 12))]) for i in range(1, 12)]
    best = min(cost(x[0], w[0], levels) for levels in cuts)
    found = cost(x[0], w[0], q.codebook[0, 0])
    assert found <= 1.0001 * best + 1e-7
    assert found == pytest.approx(float((w * (x - q.dequantize()).square()).sum()), abs=1e-6)


def test_levels_of_few_values_are_those_values() -> None:
    """Four distinct values, four levels: no error, whatever the block."""
    W = torch.tensor([-3.0, 0.5, 1.0, 7.0])[torch.randint(0, 4, (6, 40), generator=torch.Generator().manual_seed(0))]
    for block in ((1, -1), (1, 16), (-1, -1), (4, 7)):
        q = fit_codebooks(W, Spec(grid=CodebookGrid(2), block=block))
        assert q.dequantize().equal(W)
        assert q.codebook is not None
        assert bool((q.codebook.diff(dim=-1) >= 0).all())


def test_a_codebook_beats_every_uniform_grid_over_the_range() -> None:
    g = torch.Generator().manual_seed(0)
    W, F = torch.randn(16, 200, generator=g) ** 3, torch.rand(16, 200, generator=g) ** 4
    for bits, block in ((2, (1, -1)), (3, (1, 48)), (4, (1, -1))):
        q = fit_codebooks(W, Spec(grid=CodebookGrid(bits), block=block, scale=FloatGrid("float32")), F)
        size = 200 if block[1] == -1 else block[1]
        for start in range(0, 200, size):
            part = slice(start, start + size)
            for n, (w, f, d) in enumerate(zip(W[:, part], F[:, part], q.dequantize()[:, part], strict=True)):
                uniform = torch.linspace(w.min().item(), w.max().item(), 1 << bits)
                assert float((f * (w - d).square()).sum()) <= cost(w, f, uniform) * 1.0001, n


def test_weights_that_count_nothing_are_fitted_all_alike() -> None:
    W = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    spec = Spec(grid=CodebookGrid(2))
    assert fit_codebooks(W, spec, torch.zeros_like(W)).dequantize().equal(fit_codebooks(W, spec).dequantize())
    for pair in combinations((fit_codebooks(W, spec, torch.full_like(W, c)).dequantize() for c in (1.0, 64.0)), 2):
        assert pair[0].equal(pair[1])
