"""Kernels and shipped configurations compiled for machines that are not here: no spills, shared memory that fits."""

import re
from dataclasses import replace
from itertools import product as pairs_of

import pytest
import torch

pytest.importorskip("triton")

from hf_quant.kernels._gemm import ahead
from hf_quant.kernels._gemm.configs import SHARED, Config, fit, shipped
from hf_quant.kernels._gemm.operand import Weight, unit_for

SHAPE = (4096, 4096)
W4 = Weight(SHAPE, 4, 128, ranges="pairs")


def sound(compiled: ahead.Compiled, target: str) -> None:
    assert compiled.spills == 0
    assert compiled.registers <= (512 if target.startswith("gfx") else 255)
    assert compiled.shared <= SHARED[target]


def of(target: str, weight: Weight) -> Weight:
    """The weight as it is laid out for a machine."""
    return replace(weight, unit=unit_for(target, weight.group, weight.shape[1]))


def compiled(
    weight: Weight, dtype: torch.dtype, config: Config, target: str, rank: int = 0, experts: bool = False
) -> ahead.Compiled:
    """The product as a machine of this kind would run it."""
    weight = weight if dtype == torch.int8 else of(target, weight)
    config = fit(config, weight, dtype.itemsize, target, SHARED[target])
    return ahead.product(weight, dtype, config, target, rank=rank, experts=experts)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_load_feeds_the_fragment(target: str, bits: int) -> None:
    """What a thread loads is what it multiplies: between memory and tensor core no weight goes to another thread.

    All copies ahead are of 16 bytes, but those of scales; in the loop nothing is exchanged or stored to shared memory.
    """
    weight = of(target, replace(W4, bits=bits))
    code = ahead.product(weight, torch.bfloat16, Config("tensor", BM=16, BN=64), target).asm["ptx"]
    first = code.index("mma")
    last = code.rindex("mma.sync" if target == "sm_80" else "wgmma.mma_async")
    loop = code[code.rindex("\n$L", 0, first) : last]
    assert "shfl" not in loop
    assert "st.shared" not in loop
    assert len(re.findall(r"cp\.async\.cg\.shared\.global \[[^;]*0x10", code)) >= 4


FEW = [
    (replace(W4, bits=2, zero=2), 2.5),
    (replace(W4, bits=2, group=64, zero=2), 2.8),
    (replace(W4, bits=3, zero=4), 2.6),
    (replace(W4, bits=3, group=64), 3.0),
    (replace(W4, zero=8), 3.0),
    (W4, 3.0),
    (replace(W4, bits=8, group=4096, zero=128), 3.5),
    (Weight(SHAPE, 4, 64, "levels"), 6.8),
    (Weight(SHAPE, 4, 4096, "codebooks"), 6.0),
    (Weight(SHAPE, 4, 32, "mxfp4", "powers"), 5.3),
    (Weight(SHAPE, 4, 16, "float4", "small_floats"), 7.6),
]


@pytest.mark.parametrize(("weight", "most"), FEW, ids=[f"{w.decode}{w.bits} {w.group} {w.zero}" for w, _ in FEW])
def test_instructions_a_weight(weight: Weight, most: float) -> None:
    """Of the loop for few tokens on Hopper, where issuing them takes as long as reading the weights.

    And no weight goes to another thread there either. README.md has the counts, with Triton 3.7; a twentieth is room
    for another.
    """
    config = fit(shipped()["sm_90"]["8"], weight, 2, "sm_90", SHARED["sm_90"])
    loop = ahead.loop_of(ahead.product(weight, torch.bfloat16, config, "sm_90"))
    weights = config.BN * config.blocks(weight, 2) * weight.shuffle.columns
    assert len(loop) / (weights / (32 * config.num_warps)) <= most
    assert not [line for line in loop if line.startswith(("STS", "SHFL"))]


@pytest.mark.parametrize(
    "tile", [(16, 128, 128, 4), (32, 128, 128, 4), (64, 128, 128, 4), (256, 64, 64, 4), (128, 128, 64, 8)]
)
def test_no_weight_is_overwritten_while_it_is_multiplied(tile: tuple[int, int, int, int]) -> None:
    """Hopper's product reads registers until it is waited for; the assembler does not know."""
    BM, BN, BK, warps = tile
    loop = ahead.loop_of(ahead.product(W4, torch.bfloat16, Config("tensor", BM, BN, BK, 1, warps, 3), "sm_90"))
    products = [(i, int(m[1])) for i, line in enumerate(loop) if (m := re.match(r"HGMMA\S+ R\d+, R(\d+), gdesc", line))]
    assert products
    for at, first in products:
        later = loop[at + 1 :] + loop[:at]  # and the next turn
        waited = next(i for i, line in enumerate(later) if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line)
        written = {
            m[1] for line in later[:waited] if (m := re.match(r"(?:@\S+ )?(?!ST|HGMMA|LDGSTS)[A-Z]\S* R(\d+)", line))
        }
        assert not written & {str(first + i) for i in range(4)}


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths(bits: int) -> None:
    sound(compiled(replace(W4, bits=bits), torch.float16, shipped()["sm_80"]["16"], "sm_80"), "sm_80")


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_the_other_kernels(target: str) -> None:
    """Quantizers, 8-bit products, sums of parts, experts, tables, dequantization: each once on every machine."""
    stages = 2 if target.startswith("gfx") else 4
    nvfp4 = Weight(SHAPE, 4, 16, "float4", "small_floats")
    books = Weight(SHAPE, 3, 4096, "codebooks")
    few = Config("tensor", num_stages=stages)
    kernels = [
        ahead.quantizer(torch.int8, target),
        ahead.quantizer(torch.uint8, target, steps=10),
        ahead.eight_bit(torch.int8, target),
        ahead.eight_bit(torch.int8, target, experts=True, splits=4),
        ahead.eight_bit(torch.int8, target, rank=32),  # LLM.int8's columns
        compiled(Weight(SHAPE, 4, 64, "signed_integers", "scales_and_zeros"), torch.bfloat16, few, target),
        compiled(replace(W4, ranges="scales", unit=4), torch.int8, few, target),
        compiled(W4, torch.float16, few, target, rank=32, experts=True),
        compiled(nvfp4, torch.bfloat16, few, target),
        compiled(books, torch.float16, replace(few, splits=2), target),
        compiled(Weight(SHAPE, 8, 4096, "float8_e4m3"), torch.bfloat16, few, target),
        ahead.dequantizer(W4, torch.bfloat16, target),
    ]
    if target in ("sm_90", "sm_100"):
        kernels += [ahead.eight_bit(torch.float8_e4m3fn, target, whole=w) for w in (True, False)]
    for kernel in kernels:
        sound(kernel, target)


GROUPS = ((128, "pairs"), (32, "pairs"), (4096, "scales"))


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_shipped_configuration_once(target: str) -> None:
    """Each with another width, type and group than its neighbours; all with all of them before a release."""
    for i, config in enumerate(dict.fromkeys(shipped()[target].values())):
        (group, ranges), bits = GROUPS[i % 3], (4, 3, 2, 8)[i % 4]
        weight = Weight(SHAPE, bits, group, ranges=ranges)
        sound(compiled(weight, (torch.float16, torch.bfloat16)[i % 2], config, target), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_shipped_configuration(target: str, bits: int, dtype: torch.dtype) -> None:
    for config, (group, ranges) in pairs_of(set(shipped()[target].values()), GROUPS):
        weight = Weight(SHAPE, bits, group, ranges=ranges)
        sound(compiled(weight, dtype, config, target), target)


def test_addresses_have_64_bits() -> None:
    """Of tensors; a program's own number and what is counted within a tile may have 32."""
    kernels = {
        "product": (ahead.product(W4, torch.bfloat16, Config("tensor"), "sm_90", experts=True), ("1x128", "4x128")),
        "8 bits": (ahead.eight_bit(torch.int8, "sm_90", experts=True), ()),
        "tokens": (ahead.quantizer(torch.int8, "sm_90", steps=10), ()),
        "dequantized": (ahead.dequantizer(W4, torch.bfloat16, "sm_90"), ("1x128", "4x128")),
    }
    for name, (compiled_kernel, within) in kernels.items():
        code = compiled_kernel.asm["ttir"]
        offsets = re.findall(r"tt\.addptr [^:]*: tensor<(\S+)x!tt\.ptr<\w+>>, tensor<\S+x(i\d+)>", code)
        narrow = [shape for shape, width in offsets if width != "i64" and shape not in within]
        assert len(offsets) > len(narrow) + 2 * bool(within), name
        assert not narrow, f"{name}: {narrow}"
