"""What every packed format owes, checked on every registered one. Being found by `formats()` means being covered."""

from functools import cache
from pathlib import Path

import pytest
import torch

from hf_quant.formats import Kernel, Layer, format_for, format_named, formats
from hf_quant.grids import FloatGrid, IntGrid, LevelGrid
from hf_quant.kernels.bnb_4bit.format import FP4, NF4
from hf_quant.spec import Spec
from hf_quant.testing import format_conformance as conformance
from hf_quant.testing.format_conformance import CPU, DTYPES, Case
from hf_quant.testing.format_layers import (
    close,
    every_layer,
    layers_with,
    make,
    sample_layers,
    slow_linear,
    tensors_of,
)

__all__ = ["CPU", "DTYPES", "close", "held", "kernel_named", "make", "run_kernel", "slow_linear", "tensors_of"]

LEVELS = (  # what bitsandbytes stores: tables of its own
    *(
        Spec(grid=LevelGrid(x), block=(1, b), scale=FloatGrid("float32"))
        for x in (NF4, sorted({*FP4}))
        for b in (32, 64)
    ),
    *(Spec(grid=LevelGrid(NF4), block=(1, b), scale=FloatGrid(s)) for b, s in ((-1, "float16"), (50, "bfloat16"))),
)


@cache
def held(format_id: str) -> list[Layer]:
    """Every sample layer the format stores."""
    fmt = format_named(format_id)
    return sample_layers(fmt) + [layer for layer in layers_with(LEVELS) if fmt.holds(layer) is None]


IDS = sorted(formats())
each_format = pytest.mark.parametrize("format_id", IDS)
QUIET = [
    c
    for c in conformance.CHECKS
    if c not in (conformance.its_kernels_compute_the_same, conformance.its_products_are_operators)
]


@each_format
@pytest.mark.parametrize("check", QUIET, ids=[c.__name__ for c in QUIET])
def test_format(check: conformance.Check, format_id: str, tmp_path: Path) -> None:
    check(format_named(format_id), held(format_id), tmp_path)


@each_format
def test_has_layers_to_test(format_id: str) -> None:
    assert len(held(format_id)) >= 5


def kernel_named(format_id: str, name: str) -> Kernel:
    return next(k for k in format_named(format_id).kernels if k.name == name)


def run_kernel(case: Case, tokens: int, format_id: str, name: str, device: torch.device) -> None:
    """One kernel on one layer, against the definition."""
    conformance.run_kernel(case, tokens, format_named(format_id), kernel_named(format_id, name), device)


# kernel by kernel, so that each is a test of its own
KERNELS = [(format_id, kernel.name) for format_id in IDS for kernel in format_named(format_id).kernels]
CPU_KERNELS = [
    (i, name) for i, name in KERNELS if conformance.supported(format_named(i), held(i), kernel_named(i, name))
]
REPLACING = [(i, name) for i, name in CPU_KERNELS if name in format_named(i).replaces]


@pytest.mark.parametrize(("format_id", "name"), CPU_KERNELS)
def test_kernel_equals_reference(format_id: str, name: str) -> None:
    conformance.kernel_equals_reference(format_named(format_id), held(format_id), kernel_named(format_id, name))


@pytest.mark.parametrize(("format_id", "name"), REPLACING)
def test_a_layout_gives_back_what_it_replaces(format_id: str, name: str) -> None:
    fmt = format_named(format_id)
    conformance.layout_gives_back_what_it_replaces(fmt, held(format_id), kernel_named(format_id, name))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 9, 40, 150])
@pytest.mark.parametrize(("format_id", "name"), KERNELS)
def test_kernel_equals_reference_on_gpu(format_id: str, name: str, tokens: int) -> None:
    fmt, kernel = format_named(format_id), kernel_named(format_id, name)
    conformance.kernel_equals_reference_on_gpu(fmt, held(format_id), kernel, [tokens])


@pytest.mark.parametrize(("format_id", "name"), [(i, None) for i in IDS] + CPU_KERNELS)
def test_operator(format_id: str, name: str | None) -> None:
    kernel = None if name is None else kernel_named(format_id, name)
    with conformance.poisoned():
        conformance.is_an_operator(format_named(format_id), held(format_id), kernel)


def test_integers_always_find_a_format() -> None:
    for layer in every_layer():
        if isinstance(layer.weights.grid, IntGrid):
            assert format_for(layer).holds(layer) is None
