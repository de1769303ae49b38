"""The Triton kernel without a GPU: run by Triton's interpreter, and compiled ahead of time for three machines."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hf_quant.formats import Layer  # noqa: E402
from hf_quant.kernels.int_group.triton import (  # noqa: E402
    FEW_TOKENS,
    MANY_TOKENS,
    Tile,
    constants,
    int_group_fwd_kernel,
)
from hf_quant.spec import int_spec  # noqa: E402


def test_under_the_interpreter() -> None:
    """Triton decides when a kernel is defined whether it is interpreted, so those tests have their own process."""
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here.with_name("triton_interpreted_test.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 20
    assert "skipped" not in done.stdout


SIGNATURE = (
    *(("x_ptr", "*{x}"), ("q_ptr", "*i32"), ("s_ptr", "*bf16"), ("z_ptr", "*u8"), ("y_ptr", "*{x}")),
    *((name, "i32") for name in ("M", "N", "K", "words", "group", "s_row")),
)


def compiled(dtype: str, bits: int, tile: Tile, target: GPUTarget) -> "triton.compiler.CompiledKernel":
    fixed = constants(Layer((4096, 4096), int_spec(bits, 128)), tile)
    signature = {n: t.format(x=dtype) for n, t in SIGNATURE} | dict.fromkeys(fixed, "constexpr")
    names = list(signature)
    aligned = [n for n, _ in SIGNATURE if n != "M"]
    source = ASTSource(
        fn=int_group_fwd_kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in fixed.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize(
    ("dtype", "bits", "tile", "capability"),
    [("fp16", 4, FEW_TOKENS, 80), ("bf16", 4, MANY_TOKENS, 90), ("bf16", 3, MANY_TOKENS, 80)],
)
def test_compiles_for_nvidia_without_spills(dtype: str, bits: int, tile: Tile, capability: int, tmp_path: Path) -> None:
    kernel = compiled(dtype, bits, tile, GPUTarget("cuda", capability, 32))
    assert "mma" in kernel.asm["ptx"]  # tensor cores
    assert kernel.metadata.shared <= 99 * 1024  # the least an sm_80 or newer machine has
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    assert stack == local == 0  # nothing spilled
    assert registers <= 255


def test_compiles_for_amd_without_spills() -> None:
    kernel = compiled("bf16", 4, FEW_TOKENS, GPUTarget("hip", "gfx942", 64))
    assembly = kernel.asm["amdgcn"]
    assert "v_mfma" in assembly
    assert set(re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)) == {"0"}
    assert set(re.findall(r"\.sgpr_spill_count:\s+(\d+)", assembly)) == {"0"}
    assert kernel.metadata.shared <= 64 * 1024
