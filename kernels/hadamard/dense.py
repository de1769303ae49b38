"""The transform as products with Kronecker factors of at most RADIX: fewer passes over memory. Runs on every device."""

from functools import cache
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.hadamard import core, paley, signs, sylvester

RADIX = 64  # factors up to this order are multiplied densely


class Dense:
    """`(x signs) (I (x) H)` along the last axis, or its inverse `(x (I (x) H^T)) signs`; in x's type.

    float16 and bfloat16 are computed in float32; a sum of `size` values has no room in them.
    """

    name: ClassVar[str] = "dense"

    def supports(self, x: Tensor, size: int) -> str | None:
        """Everything."""
        return None

    def run(self, x: Tensor, size: int, seed: int | None, inverse: bool) -> Tensor:
        """See `op.Kernel.run`."""
        dtype, size = torch.promote_types(x.dtype, torch.float32), gcd(size, x.shape[-1])
        m = core(size) or 1
        y = x.to(dtype)
        if seed is not None and not inverse:
            y = y * _signs(x.shape[-1], seed, x.device, dtype)
        if m > 1:
            K = _factor(m, True, x.device, dtype)
            y = y.reshape(-1, m) @ (K.T if inverse else K)
        left, inner = size // m, m  # H_left acts on axes of `left` rows that are `inner` apart
        while left > 1:
            radix = min(left, RADIX)
            y = _factor(radix, False, x.device, dtype) @ y.reshape(-1, radix, inner)
            left, inner = left // radix, inner * radix
        y = y.reshape(x.shape)
        if seed is not None and inverse:
            y = y * _signs(x.shape[-1], seed, x.device, dtype)
        return y.to(x.dtype)


@cache
def _factor(order: int, of_paley: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An orthogonal factor, scaled by `1 / sqrt(order)`."""
    whole: Tensor = (paley if of_paley else sylvester)(order).double() / order**0.5
    return whole.to(device, dtype)


@cache
def _signs(width: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return signs(width, seed).to(device, dtype)
