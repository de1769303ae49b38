"""The inline PTX without a GPU: its few instructions carried out here, against the arithmetic it stands for."""

import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hf_quant.kernels._gemm.decode import (
    BFLOAT16_ASM,
    BFLOAT16_PARTS_ASM,
    BYTES_ASM,
    FLOAT16_ASM,
    FLOAT16_PARTS_ASM,
    MXFP4_ASM,
)


def halves(word: Tensor, dtype: torch.dtype) -> Tensor:
    """A column of words -> the two numbers in each, float64."""
    return torch.stack((word & 0xFFFF, (word >> 16) & 0xFFFF), -1).to(torch.uint16).view(dtype).double()


def joined(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Two numbers a word, rounded once: float64 holds the products and sums here exactly."""
    bits = numbers.to(dtype).view(torch.uint16).long()
    return bits[..., 0] | bits[..., 1] << 16


def single(bits: Tensor) -> Tensor:
    """The float32 of a word's bits, in float64."""
    return bits.to(torch.uint32).view(torch.float32).double()


def word(number: Tensor) -> Tensor:
    """The bits of a float64 rounded to float32."""
    return number.float().view(torch.int32).long() & 0xFFFFFFFF


def turned(x: Tensor, by: Tensor) -> Tensor:
    """A word turned to the right."""
    return (x >> by | x << (32 - by)) & 0xFFFFFFFF


def permuted(low: Tensor, high: Tensor, selector: Tensor) -> Tensor:
    """`prmt`: four of the eight bytes of two words."""
    eight = low | high << 32
    return sum(((eight >> (8 * ((selector >> (4 * i)) & 7))) & 0xFF) << (8 * i) for i in range(4))  # type: ignore[return-value]


def carry_out(asm: object, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
    """PTX with inputs $2.., results $0 and $1, of the instructions that ours needs."""
    registers = {f"${i + 2}": x for i, x in enumerate(operands)}

    def value(name: str) -> Tensor:
        return torch.tensor(int(name, 16)) if name.startswith("0x") else registers[name]

    for line in str(getattr(asm, "value", asm)).strip("{} ").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        if found := re.fullmatch(r"mov\.b32 \{\$0, \$1\}, (\w+)", line):
            return registers[found[1]] & 0xFFFF, (registers[found[1]] >> 16) & 0xFFFF
        name, arguments = line.split(" ", 1)
        target, *sources = arguments.split(", ")
        x = [value(s) for s in sources]
        dtype = torch.bfloat16 if "bf16" in name else torch.float16
        match name:
            case "mov.b32":
                registers[target] = x[0]
            case "and.b32":
                registers[target] = x[0] & x[1]
            case "shr.u32":
                registers[target] = x[0] >> x[1]
            case "shf.r.wrap.b32":
                assert sources[0] == sources[1]
                registers[target] = turned(x[0], x[2])
            case "lop3.b32":
                assert x[3] == 0xEA, "the table of (a and b) or c"
                registers[target] = x[0] & x[1] | x[2]
            case "prmt.b32":
                registers[target] = permuted(*x)
            case "add.rn.f16x2":
                registers[target] = joined(halves(x[0], dtype) + halves(x[1], dtype), dtype)
            case "mul.rn.f16x2":
                registers[target] = joined(halves(x[0], dtype) * halves(x[1], dtype), dtype)
            case "fma.rn.bf16x2":
                registers[target] = joined(halves(x[0], dtype) * halves(x[1], dtype) + halves(x[2], dtype), dtype)
            case "add.rn.f32":
                registers[target] = word(single(x[0]) + single(x[1]))
            case "mul.rn.f32":
                registers[target] = word(single(x[0]) * single(x[1]))
            case "cvt.rn.bf16x2.f32":
                registers[target] = joined(torch.stack((single(x[1]), single(x[0])), -1), dtype)
            case _:
                raise AssertionError(f"{name} is not known here")
    raise AssertionError("no result")


def twice(bits: int) -> Tensor:
    return torch.tensor((bits & 0xFFFF) * 0x00010001)


def scales_of(dtype: torch.dtype, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).abs().mul(0.1).to(dtype)


def noise(*shape: int) -> Tensor:
    """Words of other planes."""
    return torch.randint(0, 1 << 32, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("asm", "dtype", "bits", "minus", "magic"),
    [(FLOAT16_ASM, torch.float16, 8, 0xE400, 0x64006400), (BFLOAT16_ASM, torch.bfloat16, 7, 0xC300, 0x43004300)],
)
def test_every_code_and_zero_point(asm: object, dtype: torch.dtype, bits: int, minus: int, magic: int) -> None:
    """`(code - z) s` rounded once, for every pair of code and zero point and many scales."""
    code, mask = torch.arange(1 << bits), ((1 << bits) - 1) * 0x00010001
    shift = 16 - 2 * bits if bits < 8 else 0  # another plane than the first where there is one
    w = noise(len(code)) & (0xFFFFFFFF ^ mask << shift) | (code | code.flip(0) << 16) << shift
    for zero in range(0, 1 << bits, 1 if bits < 8 else 5):
        for s in scales_of(dtype, 40):
            scale, offset = twice(int(s.view(torch.uint16).item())), twice(minus + zero)
            even, odd = carry_out(asm, [w, torch.tensor(shift), torch.tensor(mask), scale, offset, torch.tensor(magic)])
            expected = ((code - zero).float() * s.float()).to(dtype)
            assert torch.equal(even.to(torch.uint16).view(dtype), expected)
            assert torch.equal(odd.to(torch.uint16).view(dtype), expected.flip(0))


@pytest.mark.parametrize(("bits", "low"), [(3, 2), (6, 4)])
@pytest.mark.parametrize(
    ("asm", "dtype", "minus", "magic"),
    [
        (FLOAT16_PARTS_ASM, torch.float16, 0xE400, 0x64006400),
        (BFLOAT16_PARTS_ASM, torch.bfloat16, 0xC300, 0x43004300),
    ],
)
def test_codes_in_two_parts(bits: int, low: int, asm: object, dtype: torch.dtype, minus: int, magic: int) -> None:
    """Every code in every plane: low bits of one word, high ones of another."""
    code, high, s, zero = torch.arange(1 << bits), bits - low, scales_of(dtype, 1)[0], 3
    both = code | code.flip(0) << 16
    for plane in range(16 // high):
        shift, at = low * (plane % (16 // low)), high * plane
        below, above = ((1 << low) - 1) * 0x00010001, ((1 << high) - 1) * 0x00010001
        w = noise(len(code)) & (0xFFFFFFFF ^ below << shift) | (both & below) << shift
        w2 = noise(len(code)) & (0xFFFFFFFF ^ above << at) | (both >> low & above) << at
        operands = [w, shift, below, twice(int(s.view(torch.uint16).item())), twice(minus + zero), magic]
        operands += [w2, (at + 32 - low) % 32, above << low]
        even, odd = carry_out(asm, [torch.as_tensor(o) for o in operands])
        expected = ((code - zero).float() * s.float()).to(dtype)
        assert torch.equal(even.to(torch.uint16).view(dtype), expected)
        assert torch.equal(odd.to(torch.uint16).view(dtype), expected.flip(0))


def test_bytes_in_bfloat16() -> None:
    """Every code, many zero points, both planes."""
    code = torch.arange(256)
    for plane, zero in ((0, 0), (1, 255), (0, 128), (1, 7)):
        for s in scales_of(torch.bfloat16, 20):
            w = noise(256) & (0xFFFFFFFF ^ 0x00FF00FF << 8 * plane) | (code | code.flip(0) << 16) << 8 * plane
            scale = word(s.double())
            offset = torch.tensor(0xCB000000 + zero)
            even, odd = carry_out(
                BYTES_ASM, [w, torch.tensor(0x7440 + plane), torch.tensor(0x7442 + plane), scale, offset]
            )
            expected = ((code - zero).float() * s.float()).bfloat16()
            assert torch.equal(even.to(torch.uint16).view(torch.bfloat16), expected)
            assert torch.equal(odd.to(torch.uint16).view(torch.bfloat16), expected.flip(0))


def test_mxfp4_in_bfloat16() -> None:
    """Every code in every plane, every scale that gives no infinity."""
    code = torch.arange(16)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for plane in range(4):
        for byte in range(252):
            w = noise(16) & (0xFFFFFFFF ^ 0x000F000F << 4 * plane) | (code | code.flip(0) << 16) << 4 * plane
            scale = 2.0 ** (byte - 127)
            bits = int(torch.tensor(scale).bfloat16().view(torch.uint16).item())
            turns = [torch.tensor((4 * plane + 26) % 32), torch.tensor((4 * plane + 20) % 32)]
            even, odd = carry_out(MXFP4_ASM, [w, *turns, twice(bits)])
            expected = (values.double() * scale).bfloat16()
            assert torch.equal(even.to(torch.uint16).view(torch.bfloat16), expected)
            assert torch.equal(odd.to(torch.uint16).view(torch.bfloat16), expected.flip(0))
