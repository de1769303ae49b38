"""The inline PTX without a GPU: its few instructions carried out here, against the arithmetic it stands for."""

import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hf_quant.kernels._gemm.decode import BFLOAT16_ASM, FLOAT16_ASM


def halves(word: Tensor, dtype: torch.dtype) -> Tensor:
    """A column of words -> the two numbers in each, float64."""
    return torch.stack((word & 0xFFFF, (word >> 16) & 0xFFFF), -1).to(torch.uint16).view(dtype).double()


def joined(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Two numbers a word, rounded once: float64 holds the products and sums here exactly."""
    bits = numbers.to(dtype).view(torch.uint16).long()
    return bits[..., 0] | bits[..., 1] << 16


def carry_out(asm: str, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
    """PTX of registers t and u, inputs $2.., results $0 and $1."""
    registers = {f"${i + 2}": x for i, x in enumerate(operands)}

    def value(name: str) -> Tensor:
        return torch.tensor(int(name, 16)) if name.startswith("0x") else registers[name]

    for line in asm.strip("{} ").split(";"):
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
            case "or.b32":
                registers[target] = x[0] | x[1]
            case "add.rn.f16x2":
                registers[target] = joined(halves(x[0], dtype) + halves(x[1], dtype), dtype)
            case "mul.rn.f16x2":
                registers[target] = joined(halves(x[0], dtype) * halves(x[1], dtype), dtype)
            case "fma.rn.bf16x2":
                registers[target] = joined(halves(x[0], dtype) * halves(x[1], dtype) + halves(x[2], dtype), dtype)
            case _:
                raise AssertionError(f"{name} is not known here")
    raise AssertionError("no result")


@pytest.mark.parametrize(
    ("asm", "dtype", "bits", "magic"),
    [(FLOAT16_ASM, torch.float16, 8, 0xE400), (BFLOAT16_ASM, torch.bfloat16, 7, 0xC300)],
)
def test_every_code_and_zero_point(asm: object, dtype: torch.dtype, bits: int, magic: int) -> None:
    """`(code - z) s` rounded once, for every pair of code and zero point and many scales."""
    code = torch.arange(1 << bits)
    scales = torch.randn(40, generator=torch.Generator().manual_seed(bits)).abs().mul(0.1).to(dtype)
    for zero in range(0, 1 << bits, 1 if bits < 8 else 5):
        for s in scales:
            scale = int(s.view(torch.uint16).item())
            words = [code | code.flip(0) << 16, torch.tensor(scale | scale << 16)]
            offset = (magic + zero) & 0xFFFF
            even, odd = carry_out(str(getattr(asm, "value", asm)), [*words, torch.tensor(offset | offset << 16)])
            expected = ((code - zero).float() * s.float()).to(dtype)
            assert torch.equal(even.to(torch.uint16).view(dtype), expected)
            assert torch.equal(odd.to(torch.uint16).view(dtype), expected.flip(0))
