"""Room for weights: where it lies and what the system is told of it."""

import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_quant.kernels._cpu.memory import PAGE, room

SMAPS = Path("/proc/self/smaps")


def flags(at: int) -> list[str]:
    """`VmFlags` of the mapping that holds an address."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        name, *values = line.split()
        if "-" in name and not name.endswith(":"):
            first, last = (int(part, 16) for part in name.split("-"))
            inside = first <= at < last
        elif inside and name == "VmFlags:":
            return values
    raise AssertionError(f"{at:x} is not mapped")


@pytest.mark.parametrize("size", [(3, 5), (PAGE - 1,), (PAGE,), (5, PAGE // 2, 1)])
def test_is_a_tensor_of_its_size_that_keeps_what_is_written(size: tuple[int, ...]) -> None:
    held: Tensor = room(*size)
    assert (tuple(held.shape), held.dtype) == (size, torch.uint8)
    assert held.is_contiguous()
    pattern = torch.arange(held.numel()).to(torch.uint8).view(size)
    assert torch.equal(held.copy_(pattern), pattern)
    assert torch.equal(held.clone(), pattern)


@pytest.mark.skipif(not SMAPS.exists() or not hasattr(mmap, "MADV_HUGEPAGE"), reason="not Linux")
def test_whole_pages_are_large_and_the_end_is_not() -> None:
    held = room(2 * PAGE + 100)
    assert held.data_ptr() % PAGE == 0
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without large pages")
    assert "hg" in flags(held.data_ptr())
    assert "hg" in flags(held.data_ptr() + 2 * PAGE - 1)
    assert "hg" not in flags(held.data_ptr() + 2 * PAGE)
