"""The inline PTX without a GPU: its few instructions carried out here, in Triton's interpreter, which has none."""

import ctypes
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from hf_quant.formats import Layer, format_named
from hf_quant.kernels._gemm import decode, launch
from hf_quant.kernels._gemm.configs import Config
from hf_quant.kernels._gemm.launch import matmul
from hf_quant.kernels._gemm.loop import load_words
from hf_quant.kernels._gemm.operand import MAGIC, Weight, ranges_of, table_of
from hf_quant.kernels._gemm.words import Shuffle
from hf_quant.kernels.int_group.gpu import Triton, operand
from hf_quant.runtime.packed import refit
from hf_quant.spec import int_spec

WORD = 0xFFFFFFFF


def halves(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Words -> the two numbers in each, float64."""
    return torch.stack((word & 0xFFFF, word >> 16), -1).to(torch.uint16).view(dtype).double()


def joined(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Two numbers a word, rounded once: float64 holds the products and sums here exactly."""
    bits = numbers.to(dtype).view(torch.uint16).long()
    return bits[..., 0] | bits[..., 1] << 16


def permuted(low: Tensor, high: Tensor, selector: Tensor) -> Tensor:
    """`prmt`: four of the eight bytes of two words."""
    byte = [(selector >> (4 * i)) & 7 for i in range(4)]
    moved = [((torch.where(b < 4, low, high) >> (8 * (b % 4))) & 0xFF) << (8 * i) for i, b in enumerate(byte)]
    return torch.stack(torch.broadcast_tensors(*moved)).sum(0)


def carry_out(asm: str, results: int, operands: Sequence[Tensor]) -> list[Tensor]:
    """PTX with results $0.. and inputs behind them, words all, of the instructions that ours needs."""
    registers = {f"${results + i}": x for i, x in enumerate(operands)}

    def value(name: str) -> Tensor:
        return torch.tensor(int(name, 16)) if name.startswith("0x") else registers[name]

    for line in asm.strip("{} ").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        if found := re.fullmatch(r"mov\.b32 \{\$0, \$1\}, (\S+)", line):
            registers |= {"$0": registers[found[1]] & 0xFFFF, "$1": registers[found[1]] >> 16}
            continue
        if found := re.fullmatch(r"mov\.b64 (\w+), \{(\S+), (\S+)\}", line):
            registers[found[1]] = registers[found[2]] | registers[found[3]] << 32
            continue
        if found := re.fullmatch(r"ld\.global\.nc\.f32 (\S+), \[(\S+)\]", line):
            address = registers[found[2]]
            bits = [ctypes.c_uint32.from_address(a).value for a in address.flatten().tolist()]
            registers[found[1]] = torch.tensor(bits).view(address.shape)
            continue
        name, arguments = line.split(" ", 1)
        target, *sources = arguments.split(", ")
        x = [value(s) for s in sources]
        dtype = torch.bfloat16 if "bf16" in name else torch.float16
        match name:
            case "mov.b32":
                registers[target] = x[0]
            case "and.b32":
                registers[target] = x[0] & x[1]
            case "shf.r.wrap.b32":
                assert sources[0] == sources[1]
                registers[target] = (x[0] >> x[2] | x[0] << (32 - x[2])) & WORD
            case "lop3.b32":
                both = x[0] & x[1]
                registers[target] = {0xEA: both | x[2], 0x6A: both ^ x[2]}[int(x[3])]
            case "prmt.b32":
                registers[target] = permuted(*x)
            case "add.rn.f16x2":
                registers[target] = joined(halves(x[0], dtype) + halves(x[1], dtype), dtype)
            case "mul.rn.f16x2":
                registers[target] = joined(halves(x[0], dtype) * halves(x[1], dtype), dtype)
            case "fma.rn.f16x2" | "fma.rn.bf16x2":
                registers[target] = joined(halves(x[0], dtype) * halves(x[1], dtype) + halves(x[2], dtype), dtype)
            case _:
                raise AssertionError(f"{name} is not known here")
    return [registers[f"${i}"] for i in range(results)]


class Results(list[interpreter.TensorHandle]):
    """What the interpreter asks for the results of an instruction."""

    def get_result(self, i: int) -> interpreter.TensorHandle:
        return self[i]


@pytest.fixture(autouse=True)
def ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes inline PTX, and launches ask for it as on an NVIDIA GPU."""

    def create_inline_asm(
        self: object,
        asm: str,
        constraints: str,
        values: list[interpreter.TensorHandle],
        types: object,
        pure: bool,
        pack: int,
    ) -> Results:
        del self, types, pure
        assert pack == 1
        kinds = [c.removeprefix("=") for c in constraints.split(",") if c.startswith("=")]
        words = [torch.from_numpy(v.data.astype(np.int64)) & WORD for v in values]
        found = carry_out(asm, len(kinds), torch.broadcast_tensors(*words))
        float32 = (np.uint32, np.float32, tl.float32)
        narrow = {"f": float32, "h": (np.uint16, np.int16, tl.int16), "r": (np.uint32, np.int32, tl.int32)}
        return Results(
            interpreter.TensorHandle(x.numpy().astype(narrow[k][0]).view(narrow[k][1]), narrow[k][2])
            for x, k in zip(found, kinds, strict=True)
        )

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    monkeypatch.setattr(launch, "BACKEND", "cuda")


@triton.jit
def decoded_kernel(
    q_ptr, range_ptr, even_ptr, odd_ptr, N, KB,
    DECODE: tl.constexpr, DTYPE: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr,
    ZERO: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """Even and odd columns of one block, 16 rows: `[16, PLANES, 8]` each, of one range a row."""
    row_block = tl.program_id(0) + tl.arange(0, 1).to(tl.int64)
    row, plane, slot = tl.arange(0, 16)[:, None, None], tl.arange(0, PLANES)[None, :, None], tl.arange(0, 8)
    s = tl.load(range_ptr + tl.program_id(0) * 16 + row)
    w0 = load_words(q_ptr, row_block, N, KB, 0, 0, WORDS, 16, True)
    w1 = load_words(q_ptr, row_block, N, KB, 0, 1, WORDS, 16, True) if WORDS > 1 else w0
    high = load_words(q_ptr, row_block, N, KB, 0, 2, WORDS, 16, True) if WORDS > 1 else w0
    low = tl.where(plane < (PLANES // 2 if WORDS > 1 else PLANES), w0, w1)
    even, odd = DECODE(low, high, plane, s, s, 0, 0, q_ptr, 0, DTYPE, BITS, ZERO, AFTER, True)
    at = tl.program_id(0) * (16 * PLANES * 8) + row * (PLANES * 8) + plane * 8 + slot[None, None, :]
    tl.store(even_ptr + at, even)
    tl.store(odd_ptr + at, odd)


def decoded(
    codes: Tensor,
    ranges: Tensor,
    bits: int,
    dtype: torch.dtype,
    name: str,
    zero: int | None = None,
    after: bool = False,
) -> Tensor:
    """One block of columns of codes, a range a row, decoded: `[N, K]` in `dtype`."""
    shuffle, (N, K) = Shuffle(bits), codes.shape
    assert N % 16 == 0
    assert shuffle.columns == K
    even, odd = torch.zeros(2, N, shuffle.planes, 8, dtype=torch.int16)
    type_of = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    decoded_kernel[(N // 16,)](
        shuffle.pack(codes), ranges, even, odd, N, 1,
        getattr(decode, name), type_of, bits, shuffle.words, shuffle.planes, zero, after,
    )  # fmt: skip
    return torch.stack((even, odd), -1).view(N, K).view(dtype)


@pytest.mark.parametrize("name", ["nf4", "nf4 scaled", "codebook 3", "codebook 4"])
@pytest.mark.parametrize("copies", [1, 3])
def test_tables(name: str, copies: int) -> None:
    """Codes looked up, in the loop, of one tensor and of several stacked: the bits of the reference."""
    generator, N, K = torch.Generator().manual_seed(0), 32, 128
    bits = 3 if name == "codebook 3" else 4
    decode_of = {"nf4": "levels", "nf4 scaled": "scaled_levels"}.get(name, "codebooks")
    weight = Weight((N, K), bits, K, decode_of)
    codes = torch.randint(0, 1 << bits, (copies, N, K), generator=generator, dtype=torch.uint8)
    levels = torch.randn(copies, 1 << bits, generator=generator)
    if decode_of == "codebooks":
        ranges, tables = torch.zeros(copies, 1, N, dtype=torch.int32), levels
        expected = torch.stack([x[c.long()] for x, c in zip(levels, codes, strict=True)])
    else:
        ranges, whole = torch.rand(copies, 1, N, generator=generator), torch.tensor([0.3])
        tables = torch.stack([table_of(x, weight, whole) for x in levels])
        expected = torch.stack([x[c.long()] for x, c in zip(levels, codes, strict=True)]) * ranges.mT
        expected = expected * whole if decode_of == "scaled_levels" else expected
    words = torch.stack([weight.shuffle.pack(c) for c in codes])
    one_hot = torch.eye(K, dtype=torch.float16)
    assert launch.constants(weight, torch.float16, Config("tensor", BN=32), "sm_80")["PTX"]
    for i in range(copies):
        blob = [words[i], ranges[i], tables[i]]
        y = matmul(one_hot, blob, weight, torch.float16, config=Config("tensor", BM=16, BN=32))
        assert torch.equal(y.T, expected[i].half())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("after", [False, True])
def test_integers(bits: int, dtype: torch.dtype, after: bool) -> None:
    """`(code - z) s` rounded once, for codes at every place and every zero point; with `after`, `code - z`."""
    generator, count = torch.Generator().manual_seed(bits), 1 << bits
    zero = torch.arange(-(-count // 16) * 16 if bits < 8 else 256) % count
    codes = torch.randint(0, count, (len(zero), Shuffle(bits).columns), generator=generator, dtype=torch.uint8)
    scale = torch.randn(len(zero), generator=generator).abs().mul(0.1).to(dtype)
    word = (scale.view(torch.int16).long() & 0xFFFF) | (MAGIC[dtype] + zero) << 16
    ranges = (word - (word >> 31 << 32)).int()
    found = decoded(codes, ranges, bits, dtype, "integers", after=after)
    difference = codes.float() - zero[:, None]
    assert torch.equal(found, (difference if after else difference * scale.float()[:, None]).to(dtype))


@pytest.mark.parametrize(("bits", "zero"), [(1, 0), (2, 2), (3, 4), (3, 3), (4, 8), (6, 32), (8, 128), (8, 127)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("after", [False, True])
def test_one_zero_point(bits: int, zero: int, dtype: torch.dtype, after: bool) -> None:
    """The same where it is a constant; with `after` a range may then be any scale, and is not read."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (64, Shuffle(bits).columns), generator=generator, dtype=torch.uint8)
    scale = torch.randn(64, generator=generator).abs().mul(0.1)
    ranges = scale if after else scale.to(dtype).view(torch.int16).int()
    found = decoded(codes, ranges, bits, dtype, "integers", zero, after)
    difference = codes.float() - zero
    assert torch.equal(found, (difference if after else difference * scale.to(dtype).float()[:, None]).to(dtype))


@pytest.mark.parametrize("after", [False, True])
def test_mxfp4(after: bool) -> None:
    """Every code at every place, every scale that gives no infinity."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.randint(0, 16, (256, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale = 2.0 ** (torch.arange(256).clamp(max=251) - 127).double()
    found = decoded(codes, scale.float(), 4, torch.bfloat16, "mxfp4", after=after)
    expected = (values[codes.long()].double() * (1 if after else scale[:, None])).bfloat16()
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 8),
    st.sampled_from((-1, 16, 32, 48, 64, 100, 128)),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from((Config("tensor", BM=8, BN=32, num_warps=1), Config("tensor", BM=16, BN=16, splits=2))),
)
def test_one_hot_is_the_weight(bits: int, group: int, symmetric: bool, N: int, K: int, config: Config) -> None:
    """The whole loop with it, for any shape: the bits of the reference."""
    spec = int_spec(bits, group, symmetric=symmetric, scale="float16")
    q = refit(torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)), spec)
    tensors, layer = format_named("int-group/1").pack(q), Layer((N, K), spec)
    blob = Triton().prepare(tensors, layer, torch.float16)
    weight = operand(layer, ranges_of(blob), "sm_80")
    tokens = range(0, K, 1 + K // 16)
    one_hot, W_KN = torch.eye(K, dtype=torch.float16)[tokens], q.dequantize(torch.float16).T
    assert launch.constants(weight, torch.float16, config, "sm_80")["PTX"] or weight.group % 16
    assert torch.equal(matmul(one_hot, blob, weight, torch.float16, config=config), W_KN[tokens])
    assert torch.equal(launch.dequantize(blob, weight, torch.float16), W_KN.T)
