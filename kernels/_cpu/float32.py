"""Tokens in float32 on a processor that multiplies bfloat16."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_quant.kernels._cpu import native
from hf_quant.kernels._cpu.layout import Kind

DENSE = 1 << 20  # weights made dense at once
FEW = 8  # tokens up to which three products are faster than making the weight dense, without tiles


def multiply(x_TK: Tensor, blob: list[Tensor], N: int, kind: Kind, group: int, middle: int) -> Tensor:
    """`x W^T`, as exact as a product of float32: three of bfloat16, or one with a weight made dense, whichever is fast.

    Values that are no bfloat16 numbers (`floats4`) would be rounded; infinite tokens give NaN where there are three.
    See `native.multiply` for the arguments.
    """
    T, K = x_TK.shape
    if kind == "floats4" or not (native.tiled() or T <= FEW):
        y_TN = x_TK.new_zeros(T, N)
        for some in columns(N, K):
            y_TN.addmm_(x_TK[:, some], native.dense(blob, N, some, kind, group, middle, torch.float32))
        return y_TN
    y_STN = native.multiply(in_terms(x_TK), blob, N, kind, group, middle, torch.float32).view(3, T, N)
    return y_STN[0] + y_STN[2].add_(y_STN[1])


def in_terms(x_TK: Tensor) -> Tensor:
    """Each number as three of bfloat16, whose sum it is to 24 bits: `[3 T, K]`, the largest first."""
    high = x_TK.bfloat16()
    rest = x_TK - high
    mid = rest.bfloat16()
    return torch.cat((high, mid, rest.sub_(mid).bfloat16()))


def columns(N: int, K: int) -> Iterator[slice]:
    """All K, so many at a time that the dense weight of them stays small; whole blocks."""
    step = max(8, DENSE // max(1, N) // 8 * 8)
    for first in range(0, K, step):
        yield slice(first, min(first + step, K))
