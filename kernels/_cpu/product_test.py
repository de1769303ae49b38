"""The C++ product against arithmetic in float64, its layout, its quantizer, and where it is not to be had."""

import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_quant.kernels._cpu import layout, native
from hf_quant.kernels._cpu.kernel import by_strip, integer_tokens, rounded, static_ranges, token_grid
from hf_quant.kernels._cpu.layout import Kind
from hf_quant.qtensor import QTensor
from hf_quant.runtime.activation import fake_quantize, quantize_input
from hf_quant.spec import Spec, act_spec

needs_it = pytest.mark.skipif(native.why_not() is not None, reason=f"no native product: {native.why_not()}")


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", layout.KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (37, 100), (33, 300)])
def test_unpacking_is_the_inverse_of_packing(kind: Kind, shape: tuple[int, int]) -> None:
    bits, (outputs, inputs) = int(kind[-1]), layout.block(kind)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    words = layout.pack(codes, kind)
    down = -(-shape[0] // 16) * 16 // outputs
    assert words.shape == (down, -(-shape[1] // inputs), outputs * inputs * bits // 8)
    found = layout.unpack(words, kind)
    assert torch.equal(found[: shape[0], : shape[1]], codes)
    assert not found[shape[0] :].any()
    assert not found[:, shape[1] :].any()


def test_golden_bytes() -> None:
    """The layouts as they are described: inputs 0 .. 7 of output 3."""
    codes = torch.zeros(16, 8, dtype=torch.uint8)
    codes[3] = torch.arange(1, 9)
    assert layout.pack(codes, "levels4")[0, 0, 12:16].tolist() == [0x31, 0x75, 0x42, 0x86]
    assert layout.pack(codes, "integers4")[0, 0, 12:16].tolist() == [0x51, 0x62, 0x73, 0x84]
    assert layout.pack(codes, "bytes8")[0, 0, 6:128:32].tolist() == [1, 3, 5, 7]
    assert layout.pack(codes, "integers8")[0, 0, [12, 13, 14, 15, 76]].tolist() == [1, 2, 3, 4, 5]
    codes = torch.zeros(16, 128, dtype=torch.uint8)
    codes[3, 5::32] = torch.tensor([1, 2, 3, 4])
    assert layout.pack(codes, "rows4")[0, 0, 3 * 64 + 10 : 3 * 64 + 12].tolist() == [0x21, 0x43]


SHIFTED: tuple[Kind, ...] = ("levels4", "bytes8", "integers4", "integers8")  # other tables have no zero points
TABLES = {
    "levels4": torch.arange(16.0) - 8,
    "scaled4": (torch.arange(16.0) - 8) / 2,
    "floats4": drawn(16),
    "levels8": drawn(256).bfloat16().float(),
}


@needs_it
@pytest.mark.parametrize(("kind", "shifted"), [*((k, False) for k in layout.KINDS), *((k, True) for k in SHIFTED)])
def test_products(kind: Kind, shifted: bool) -> None:
    """Every number of tokens that has a way of its own, ragged shapes, groups of one block and of all columns."""
    integers, bits = kind.startswith("integers"), int(kind[-1])
    middle = 1 << (bits - 1)
    small = 128 if kind == "rows4" else 8
    for N, K, group in (
        (1, 1, 8),
        (37, 100, 1 << 40),
        (48, 192, 64),
        (100, 520, 8),
        (70, 1040, 520),
        (33, 1100, 1 << 40),
    ):
        group = 1 << 40 if group >= K else -(-group // small) * small
        codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(K))
        G, rows = -(-K // group), -(-N // 16) * 16
        scale, tensor = drawn(G, rows).abs() + 0.1, torch.full((1,), 0.37 if kind == "scaled4" else 1)
        scale = scale.log2().round().exp2() if kind == "scaled4" else scale
        shift = drawn(G, rows).mul(3).round() * shifted
        of = torch.arange(K) // group
        table = TABLES.get(kind)
        if kind == "rows4":
            table, scale = drawn(rows, G, 16).bfloat16().float(), torch.ones(G, rows)
            values = table[torch.arange(N)[:, None], of, codes.int()]
            table = by_strip(table, rows).float()
        else:
            values = codes.float() - middle if table is None else table[codes.int()]
        W_NK = (values.double() + shift.double()[of, :N].T) * scale.double()[of, :N].T * tensor.double()
        zero = drawn(530).mul(9).round() if integers and shifted else None
        stored = codes - middle if kind == "bytes8" else codes
        blob = [
            layout.pack(stored, kind),
            torch.empty(0) if kind == "rows4" else by_strip(scale.T, rows),
            by_strip(shift.T, rows) if shifted else torch.empty(0),
            torch.empty(0) if table is None else native.table(table, kind),
            torch.nn.functional.pad(W_NK.sum(1).float(), (0, rows - N)) if zero is not None else torch.empty(0),
            tensor if kind == "scaled4" else torch.empty(0),
        ]
        if kind != "rows4":
            rounded_once = (values + shift[of, :N].T) * scale[of, :N].T * tensor
            for dtype, first in ((torch.float32, 0), (torch.bfloat16, 8 * (K > 8))):
                W_KN = native.dense(blob, N, slice(first, K), kind, group, middle, dtype)
                assert torch.equal(W_KN, rounded_once[:, first:].T.to(dtype))
        for M in (0, 1, 2, 3, 7, 9, 41, *((530,) if K == 100 else ())):
            ranges: tuple[native.Grid, native.Ranges] | tuple[()] = ()
            if integers:
                ints = torch.randint(-128, 128, (M, K), dtype=torch.int8, generator=torch.Generator().manual_seed(M))
                step = drawn(M).abs() + 0.1
                exact = (ints.double() - (0 if zero is None else zero[:M, None].double())) * step[:, None].double()
                x_MK = exact.float()
                ranges = native.Grid(-128, 127, shifted), (step, None if zero is None else zero[:M].contiguous())
            else:
                x_MK = drawn(M, K).bfloat16()
                exact = x_MK.double()
            y_MN = native.multiply(x_MK, blob, N, kind, group, middle, torch.float32, *ranges)
            size = exact.abs() @ W_NK.abs().T  # what rounding is relative to
            once = 2**-8 if kind == "floats4" else 2**-17  # many tokens: weights are rounded to bfloat16
            assert ((y_MN.double() - exact @ W_NK.T).abs() <= once * size + 1e-30).all()
            narrow = native.multiply(x_MK, blob, N, kind, group, middle, torch.bfloat16, *ranges)
            assert torch.equal(narrow, y_MN.bfloat16())


@needs_it
@pytest.mark.parametrize("threads", [1, 2])
def test_its_products_and_torchs_own_take_turns(threads: int) -> None:
    """Where both multiply tiles, each finds them as it needs them."""
    W_NK, x_TK = drawn(64, 256).bfloat16(), drawn(40, 256).bfloat16()
    codes = torch.randint(0, 256, (64, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    empty, scale = torch.empty(0), by_strip(torch.ones(64, 1), 64)
    blob = [layout.pack(codes, "integers8"), scale, empty, empty, empty, empty]
    known = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for _ in range(3):
            ours = native.multiply(x_TK, blob, 64, "integers8", 256, 128, torch.float32, native.Grid(-127, 127, False))
            found.append((torch.nn.functional.linear(x_TK, W_NK), ours))
    finally:
        torch.set_num_threads(known)
    codes_TK, scale_T, _ = native.quantize(x_TK, native.Grid(-127, 127, False))
    exact = (codes_TK.double() @ (codes.double() - 128).T) * scale_T[:, None].double()
    for theirs, ours in found:
        assert torch.allclose(theirs.double(), x_TK.double() @ W_NK.double().T, rtol=2**-7, atol=2**-3)
        assert torch.allclose(ours.double(), exact, rtol=2**-20, atol=1e-3)


@needs_it
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", [act_spec(8), act_spec(8, symmetric=False), act_spec(4), act_spec(6, symmetric=False)])
def test_tokens_are_quantized_as_they_are_elsewhere(spec: Spec, dtype: torch.dtype) -> None:
    x_TK = drawn(9, 100).mul(3).to(dtype)
    x_TK[2], x_TK[3], x_TK[4] = 0, x_TK[3].abs(), -x_TK[4].abs()
    assert integer_tokens(spec)
    wanted = quantize_input(x_TK, spec, {})
    same_codes(native.quantize(x_TK, token_grid(spec)), wanted, spec)
    blob = [layout.pack(torch.randint(0, 256, (16, 100), dtype=torch.uint8), "integers8"), torch.ones(1, 1, 16)]
    blob += [torch.empty(0), torch.empty(0), torch.ones(16), torch.empty(0)]
    of = blob, 16, "integers8", 1 << 40, 128, dtype, token_grid(spec)
    own = wanted.scale[:, 0], None if wanted.zero is None else wanted.zero[:, 0]
    assert torch.equal(native.multiply(x_TK, *of), native.multiply(x_TK, *of, own))
    x_TK[5, 7] = float("nan")
    for ranges in (None, own):
        assert native.quantize(x_TK, token_grid(spec), ranges)[1].isnan().tolist() == [i == 5 for i in range(9)]


@needs_it
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_tokens_are_quantized_as_they_are_elsewhere(symmetric: bool, dtype: torch.dtype) -> None:
    """One range for all, and one by row of a table; values beyond it are clipped."""
    x_TK, spec = drawn(9, 100).mul(3).to(dtype), act_spec(8, static=True, symmetric=symmetric)
    x_TK[3, 3] = float("inf")
    table = {"input_scale": torch.tensor([0.02, 0.05])} | (
        {} if symmetric else {"input_zero_point": torch.tensor([3, 90])}
    )
    for entry_T in (torch.zeros(9, dtype=torch.int64), torch.arange(9) % 2):
        rows = {name: t[entry_T] for name, t in table.items()}
        wanted = quantize_input(x_TK, replace(spec, block=(1, -1)), rows)
        same_codes(native.quantize(x_TK, token_grid(spec), static_ranges(table, entry_T, 9)), wanted, spec)
    one = {name: t[:1] for name, t in table.items()}
    of = x_TK, token_grid(spec), static_ranges(one, None, 9)
    same_codes(native.quantize(*of), quantize_input(x_TK, spec, one), spec)


@needs_it
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", [act_spec(8), act_spec(4, symmetric=False)])
def test_tokens_in_blocks_are_rounded_as_they_are_elsewhere(spec: Spec, dtype: torch.dtype) -> None:
    x_TK = drawn(9, 96).mul(3).to(dtype)
    for blocks in (replace(spec, block=(1, 32)), replace(spec, block=(1, 40))):
        assert torch.equal(rounded(x_TK, blocks, {}), fake_quantize(x_TK, blocks, {}))


def same_codes(found: tuple[Tensor, Tensor, Tensor | None], wanted: QTensor, spec: Spec) -> None:
    less, (codes, scale, zero) = 128 if spec.grid.high > 127 else 0, found
    assert torch.equal(codes.int() + less, wanted.codes.int() + spec.grid.low)
    assert torch.equal(scale, wanted.scale.flatten().expand(len(scale)))
    assert zero is None if wanted.zero is None else torch.equal(zero + less, wanted.zero.flatten().expand(len(zero)))


@needs_it
def test_threads_share_the_work_and_give_the_same() -> None:
    codes = torch.randint(0, 16, (500, 256), dtype=torch.uint8)
    blob = [
        layout.pack(codes, "levels4"),
        torch.ones(32, 1, 16),
        torch.empty(0),
        native.table(TABLES["levels4"], "levels4"),
        torch.empty(0),
        torch.empty(0),
    ]
    before = torch.get_num_threads()
    for M in (1, 8, 64):
        x = drawn(M, 256).bfloat16()
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(native.multiply(x, blob, 500, "levels4", 1 << 40, 8, torch.bfloat16))
        torch.set_num_threads(before)
        assert torch.equal(*found)
    calls = [
        threading.Thread(target=native.multiply, args=(x, blob, 500, "levels4", 1 << 40, 8, x.dtype)) for _ in "12"
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join(10)
        assert not call.is_alive()


def test_without_a_compiler_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    uncached = native.library.__wrapped__
    monkeypatch.setattr(native, "library", uncached)
    assert "no C++ compiler" in str(native.why_not.__wrapped__())
    monkeypatch.setattr(native, "_compile", lambda *_: (_ for _ in ()).throw(subprocess.CalledProcessError(1, "g++")))
    monkeypatch.setattr("shutil.which", lambda _: "/bin/false")
    assert "could not be compiled here" in str(native.why_not.__wrapped__())
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    assert "AVX2" in str(native.why_not.__wrapped__())
