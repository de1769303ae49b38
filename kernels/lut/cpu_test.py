"""The CPU kernels of tables print what they hold, bit for bit; hf_quant/every_format_test.py has other shapes."""

import pytest
import torch

from hf_quant.formats import Layer, format_named
from hf_quant.grids import E4M3, E5M2, CodebookGrid, FloatGrid, Grid, LevelGrid, MiniFloatGrid
from hf_quant.kernels._cpu import native
from hf_quant.kernels._cpu.kernel import NativeKernel
from hf_quant.kernels.bnb_4bit.format import NF4
from hf_quant.kernels.lut.cpu import CodebookCpu, TableCpu
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec

needs_it = pytest.mark.skipif(native.why_not() is not None, reason=f"no native product: {native.why_not()}")
CPU, BF16 = torch.device("cpu"), torch.bfloat16
FLOAT32, E8M0, E4M3_SCALE = FloatGrid("float32"), FloatGrid("float8_e8m0fnu"), FloatGrid("float8_e4m3fn")
TABLES: dict[str, Spec] = {
    "NF4": Spec(grid=LevelGrid(NF4), block=(1, 64)),
    "NF4, float32 scales": Spec(grid=LevelGrid(NF4), block=(1, 64), scale=FLOAT32),
    "MXFP4": Spec(grid=MiniFloatGrid(2, 1), block=(1, 32), scale=E8M0),
    "NVFP4": Spec(grid=MiniFloatGrid(2, 1), block=(1, 16), scale=E4M3_SCALE, tensor_scale=True),
    "MXFP6": Spec(grid=MiniFloatGrid(3, 2), block=(1, 32), scale=E8M0),
    "MXFP6, float32 scales": Spec(grid=MiniFloatGrid(3, 2), block=(1, 32), scale=FLOAT32),
    "FP8 rows": Spec(grid=E4M3, block=(1, -1)),
    "FP8 blocks": Spec(grid=E4M3, block=(16, 24), scale=FLOAT32),
    "E5M2": Spec(grid=E5M2, block=(-1, -1)),
    **{
        f"{bits} bits, {name}": Spec(grid=LevelGrid(tuple(0.3 * i - step for i in range(1 << bits))), block=(1, 48))
        for bits in (2, 3)
        for name, step in (("any levels", 0.4), ("others", 0.1))
    },
    "2 bits, exact": Spec(grid=LevelGrid((-1.0, 0.0, 0.5, 1.0)), block=(1, 48)),
    "3 bits, exact": Spec(grid=MiniFloatGrid(1, 1), block=(1, 48)),
}


def decoded(spec: Spec, shape: tuple[int, int], name: str, tokens: int = 1 << 20) -> None:
    """One-hot inputs, so many at a time, print the weight; the rest of a random product is torch's."""
    W_NK = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = Layer(shape, spec)
    fmt = next(f for f in map(format_named, ("float8/1", "lut-group/1", "codebook-group/1")) if f.holds(layer) is None)
    tensors = fmt.pack(refit(W_NK, spec))
    kernel = next(k for k in fmt.kernels if k.name == name)
    assert kernel.supports(layer, CPU, BF16) is None
    blob = kernel.prepare(tensors, layer, BF16)
    probes = torch.eye(shape[1], dtype=BF16).split(tokens)
    y_KN = torch.cat([kernel.run(x_TK, tensors, blob, layer) for x_TK in probes])
    assert torch.equal(y_KN.T, fmt.weight(tensors, layer, BF16))
    assert kernel.run(torch.empty(0, shape[1], dtype=BF16), tensors, blob, layer).shape == (0, shape[0])


@pytest.mark.parametrize("shape", [(48, 192), (7, 61)])
@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_quant.kernels.lut.cpu.DECODED", 3 * shape[1])  # several slices, the last one shorter
    monkeypatch.setattr("hf_quant.kernels.lut.cpu.MULTIPLIED", 20 * shape[1])
    decoded(TABLES[name], shape, TableCpu.name)


@needs_it
@pytest.mark.parametrize("name", TABLES)
def test_tables_in_registers(name: str) -> None:
    decoded(TABLES[name], (48, 192), NativeKernel.name)


@needs_it
@pytest.mark.parametrize("name", ["FP8 rows", "E5M2", "MXFP6"])
def test_one_token_sees_the_same_table(name: str) -> None:
    decoded(TABLES[name], (48, 192), NativeKernel.name, 1)


@pytest.mark.parametrize("block", [(1, -1), (1, 48), (-1, -1), (12, 32)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks(bits: int, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_quant.kernels.lut.cpu.DECODED", 5 * 192)
    monkeypatch.setattr("hf_quant.kernels.lut.cpu.MULTIPLIED", 20 * 192)
    decoded(Spec(grid=CodebookGrid(bits), block=block), (48, 192), CodebookCpu.name)


@needs_it
@pytest.mark.parametrize("tokens", [1, 7, 192])
@pytest.mark.parametrize(
    ("bits", "block", "levels"),
    [(4, (1, -1), "float16"), (3, (1, 128), "float32"), (2, (5, 128), "bfloat16"), (1, (-1, -1), "float16")],
)
def test_codebooks_in_registers(bits: int, block: tuple[int, int], levels: str, tokens: int) -> None:
    """Levels are rounded as the reference rounds them, whatever the number of tokens."""
    spec = Spec(grid=CodebookGrid(bits), block=block, scale=FloatGrid(levels))
    for shape in ((48, 256), (21, 300)):
        if shape[1] % 128 == 0 or block[1] == -1:
            decoded(spec, shape, NativeKernel.name, tokens)


def test_a_table_is_one_for_all_layers_with_the_grid() -> None:
    kernel, layers = TableCpu(), [Layer((n, 64), TABLES["MXFP4"]) for n in (16, 32)]
    assert kernel.prepare({}, layers[0], BF16)[0] is kernel.prepare({}, layers[1], BF16)[0]


def test_what_fills_no_field_is_refused() -> None:
    grids: list[Grid] = [LevelGrid(tuple(float(i) for i in range(n))) for n in (2, 32, 128)]
    for grid in grids:
        assert "do not fill" in str(TableCpu().supports(Layer((4, 64), Spec(grid=grid)), CPU, BF16))
    assert "made for bfloat16" in str(TableCpu().supports(Layer((4, 64), TABLES["NF4"]), CPU, torch.float32))
