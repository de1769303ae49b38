"""Memory for weights, in pages of 2 MB where the system gives them.

One token reads all weights once. In pages of 4 KB that is a walk through page tables that have left the cache, too, and
the processor's prefetcher stops at the end of each.
"""

import mmap

import torch
from torch import Tensor

PAGE = 1 << 21


def room(*size: int) -> Tensor:
    """uint8 tensor of this size, its content undefined; whole pages of 2 MB are asked for as such.

    What is left beyond them is an ordinary end, so that nothing is resident that is not asked for.
    """
    count = torch.Size(size).numel()
    if count < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    mapped = mmap.mmap(-1, count + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    first = -whole.data_ptr() % PAGE
    mapped.madvise(mmap.MADV_HUGEPAGE, first, count // PAGE * PAGE)
    return whole[first : first + count].view(size)
