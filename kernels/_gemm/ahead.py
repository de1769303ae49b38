"""Ahead-of-time compilation: kernels and configurations compiled for a machine that is not here, and what they use."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_quant.kernels._gemm import loop
from hf_quant.kernels._gemm.configs import Config
from hf_quant.kernels._gemm.launch import WRITING, compiled_with, constants, instruction, whole_last
from hf_quant.kernels._gemm.operand import Weight
from hf_quant.kernels._gemm.scaled import scaled_fwd_kernel
from hf_quant.kernels._gemm.tokens import tokens_fwd_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """What a compiled kernel needs of a machine.

    Attributes:
        registers: of a thread.
        spills: bytes (AMD: registers) that did not fit.
        shared: bytes of shared memory.
        asm: intermediate and final code by name: "ttir", "ttgir", "ptx" or "amdgcn".
    """

    registers: int
    spills: int
    shared: int
    asm: Mapping[str, Any]


def build(
    kernel: Any,  # noqa: ANN401  a Triton function
    arguments: Mapping[str, str],
    fixed: Mapping[str, object],
    target: str,
    *,
    ragged: tuple[str, ...] = (),
    options: Mapping[str, int] | None = None,
) -> Compiled:
    """Compile a kernel.

    Args:
        kernel: the Triton function.
        arguments: name -> Triton's type ("*bf16", "i32") of those given at run time, in order.
        fixed: name -> value of the others.
        target: a key of `TARGETS`.
        ragged: arguments that are not multiples of 16.
        options: of the compiler: "num_warps", "num_stages", "maxnreg".
    """
    names = list(kernel.arg_names)
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in fixed else arguments[n] for n in names},
        constexprs={(names.index(n),): v for n, v in fixed.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in arguments if n not in ragged},
    )
    compiled = triton.compile(source, target=TARGETS[target], options=dict(options or {}))
    registers, spills = _usage(compiled.asm)
    return Compiled(registers, spills, compiled.metadata.shared, compiled.asm)


def product(
    weight: Weight,
    dtype: torch.dtype,
    config: Config,
    target: str,
    *,
    rank: int = 0,
    experts: bool = False,
) -> Compiled:
    """The main loop with a configuration."""
    weight, whole = whole_last(weight, config)
    x, out = TYPES[dtype], "bf16" if dtype == torch.int8 else TYPES[dtype]
    blocks = config.blocks(weight, dtype.itemsize)
    pointers = {
        **{"x_ptr": f"*{x}", "q_ptr": "*i32", "s_ptr": _ranges(weight), "z_ptr": "*fp32", "table_ptr": "*fp32"},
        **{"sx_ptr": "*fp32", "zx_ptr": "*fp32", "sum_ptr": "*fp32", "a_ptr": f"*{out}", "up_ptr": f"*{out}"},
        **{"order_ptr": "*i32", "expert_ptr": "*i32", "part_ptr": "*fp32", "ticket_ptr": "*i32", "y_ptr": f"*{out}"},
    }
    numbers = [
        *("M", "N", "K", "KB", "x_row", "q_expert", "s_expert", "table_expert", "sum_expert"),
        *("copies", "blocks_per_split"),
    ]
    fixed = {
        **constants(weight, dtype, config, target, TARGETS[target].backend),
        **{"WHOLE": whole, "SHIFTED": False, "RANK": rank, "EXPERTS": experts, "SPLITS": config.splits},
        **{"VECTOR": config.way == "vector", "ROUND": False, "STAGES": config.num_stages},
        **instruction(config, weight, dtype, target),
        **{"BLOCKS": blocks, "BM": config.BM, "BN": config.BN},
    }
    return build(
        loop.gemm_fwd_kernel,
        pointers | dict.fromkeys(numbers, "i32"),
        fixed,
        target,
        options=compiled_with(config, target),
        ragged=("M", "KB", "table_expert", "copies", "blocks_per_split"),
    )


def dequantizer(weight: Weight, dtype: torch.dtype, target: str) -> Compiled:
    """The kernel that writes the whole matrix."""
    pointers = {
        **{"q_ptr": "*i32", "s_ptr": _ranges(weight), "z_ptr": "*fp32", "table_ptr": "*fp32"},
        **{"w_ptr": f"*{TYPES[dtype]}"},
    }
    fixed = {**constants(weight, dtype, WRITING, target, TARGETS[target].backend), "ROUND": False, "BN": WRITING.BN}
    numbers = dict.fromkeys(("N", "K", "KB"), "i32")
    return build(loop.dequantize_kernel, pointers | numbers, fixed, target, ragged=("KB",))


def eight_bit(
    dtype: torch.dtype,
    target: str,
    *,
    whole: bool = True,
    BM: int = 64,
    rank: int = 0,
    experts: bool = False,
    splits: int = 1,
) -> Compiled:
    """The product of 8-bit operands, with one scale a row or one a block of K."""
    x = TYPES[dtype]
    pointers = {
        **{"x_ptr": f"*{x}", "w_ptr": f"*{x}", "sw_ptr": "*fp32", "sx_ptr": "*fp32", "zx_ptr": "*fp32"},
        **{"sum_ptr": "*fp32", "a_ptr": "*bf16", "up_ptr": "*bf16"},
        **{"order_ptr": "*i32", "expert_ptr": "*i32", "part_ptr": "*fp32", "ticket_ptr": "*i32", "y_ptr": "*bf16"},
    }
    fixed = {"WHOLE": whole, "SHIFTED": True, "RANK": rank, "EXPERTS": experts, "SPLITS": splits, "EVEN": True}
    tile = {"BM": BM, "BN": 128, "BK": 128}
    numbers = dict.fromkeys(("M", "N", "K", "block", "tiles_per_split", "sw_expert", "copies"), "i32")
    ragged = ("M", "tiles_per_split", "copies")
    return build(scaled_fwd_kernel, pointers | numbers, fixed | tile, target, ragged=ragged)


def quantizer(out: torch.dtype, target: str, *, steps: int = 0) -> Compiled:
    """Tokens to int8 or (as uint8) float8, after a Hadamard transform of `2^steps` where there are steps."""
    pointers = {
        **{"x_ptr": "*bf16", "sign_ptr": "*fp32", "range_ptr": "*fp32", "zero_ptr": "*i32", "index_ptr": "*i64"},
        **{"q_ptr": f"*{TYPES[out]}", "s_ptr": "*fp32", "z_ptr": "*fp32", "K": "i32", "x_row": "i32"},
    }
    low, high = (-128, 127) if out == torch.int8 else (-448, 448)
    fixed = {
        **{"LOW": low, "HIGH": high, "SHIFT": 0, "ZERO": out == torch.int8, "STATIC": False, "TABLE": False},
        **{"SIZE": 1 << steps if steps else 4096, "STEPS": steps, "SIGNS": steps > 0, "ONCE": steps == 0},
        "CONVERTS": out == torch.uint8 and target in ("sm_90", "sm_100"),
    }
    return build(tokens_fwd_kernel, pointers, fixed, target, options={"num_warps": 8})


def loop_of(compiled: Compiled) -> list[str]:
    """The instructions of the longest loop, of an NVIDIA kernel."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = [[""]]
    for line in _tool("nvdisasm", "-c", compiled.asm["cubin"]).splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?) *;", line):
            lines.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in labels:
                loops.append(lines[labels[back[1]] :])
    return max(loops, key=len)


def _ranges(weight: Weight) -> str:
    return "*fp32" if weight.ranges in ("scales", "scales_and_zeros") and weight.decode != "codebooks" else "*i32"


def _usage(asm: Mapping[str, Any]) -> tuple[int, int]:
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        spilled = [int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", text)]
        return max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text))), sum(spilled)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", _tool("cuobjdump", "-res-usage", asm["cubin"]))
    assert found is not None  # noqa: S101  the tool's own format
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _tool(name: str, option: str, cubin: bytes) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout
