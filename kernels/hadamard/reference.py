"""The transform in plain torch: Kronecker factors of at most RADIX, one small product each. Runs on every device."""

from functools import cache

import torch
from torch import Tensor

from hf_quant.hadamard import core, paley, signs, sylvester

RADIX = 64  # factors up to this order are multiplied densely: faster than more passes over memory


def transform(x: Tensor, size: int, seed: int | None, inverse: bool) -> Tensor:
    """`(x signs) (I (x) H)` along the last axis, or its inverse `(x (I (x) H^T)) signs`; in x's type.

    float16 and bfloat16 are computed in float32; a sum of `size` values has no room in them.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    m = core(size)
    assert m is not None  # noqa: S101  a `Hadamard` has been made of it
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
