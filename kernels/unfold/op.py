"""`hf_quant::unfold`: what a quantized convolution multiplies. One operator with a fake and a gradient.

    rows[b, p, c kernel + j] = x[b, c, p stride + j dilation]

for every position p and every offset j of the kernel, axis by axis.
"""

from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hf_quant.kernels._cpu import native

Sizes = tuple[int, ...]  # an axis each


@torch.library.custom_op("hf_quant::unfold", mutates_args=())
def unfold(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """`[B, C, ...]`, padded already -> `[B, positions..., C kernel...]`."""
    how = tuple(kernel), tuple(stride), tuple(dilation)
    if x.device.type != "cpu" or not x.numel() or native.why_not() is not None:
        return strided(x, *how)
    x = x.contiguous()
    windows, runs, run = _places(tuple(x.shape[1:]), *how, x.element_size())
    return native.unfold(x, windows, runs, run).view(len(x), *positions(tuple(x.shape[2:]), *how), -1)


def strided(x: Tensor, kernel: Sizes, stride: Sizes, dilation: Sizes) -> Tensor:
    """The same by views, and one copy of them. Runs on every device."""
    n = len(kernel)
    for axis, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
    return (
        x.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
        .flatten(1 + n)
        .clone(memory_format=torch.contiguous_format)
    )


def positions(sizes: Sizes, kernel: Sizes, stride: Sizes, dilation: Sizes) -> Sizes:
    """How many windows there are along each axis."""
    each = zip(sizes, kernel, stride, dilation, strict=True)
    return tuple((size - apart * (k - 1) - 1) // step + 1 for size, k, step, apart in each)


@lru_cache(maxsize=64)
def _places(shape: Sizes, kernel: Sizes, stride: Sizes, dilation: Sizes, size: int) -> tuple[Tensor, Tensor, int]:
    """(where windows begin, where their runs do, both in bytes, values of a run) in contiguous `[C, ...]`."""
    channel, *strides = torch.empty(shape, device="meta").stride()
    apart = [a * b for a, b in zip(strides, dilation, strict=True)]
    starts = [a * b for a, b in zip(strides, stride, strict=True)]
    run = kernel[-1] if dilation[-1] == 1 else 1  # values that lie side by side
    windows = _grid(positions(shape[1:], kernel, stride, dilation), starts)
    runs = _grid([shape[0], *kernel[:-1], kernel[-1] // run], [channel, *apart])
    return windows * size, runs * size, run


def _grid(counts: Sizes | list[int], strides: list[int]) -> Tensor:
    """`i . strides` of every index i below `counts`, the last one fastest."""
    places = torch.zeros(1, dtype=torch.int64)
    for count, stride in zip(counts, strides, strict=True):
        places = (places[:, None] + torch.arange(count) * stride).flatten()
    return places


@unfold.register_fake
def _(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    sizes = positions(tuple(x.shape[2:]), tuple(kernel), tuple(stride), tuple(dilation))
    width = x.shape[1]
    for k in kernel:
        width = width * k
    return x.new_empty(x.shape[0], *sizes, width)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401  torch's own signature
    x, ctx.kernel, ctx.stride, ctx.dilation = inputs
    ctx.shape = x.shape


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
    """Every offset of the kernel has read a strided part of x once."""
    grad = grad.unflatten(-1, (ctx.shape[1], -1)).movedim(-2, 1)  # [B, C, positions..., kernel]
    whole = grad.new_zeros(ctx.shape)
    for own, offset in enumerate(product(*(range(k) for k in ctx.kernel))):
        each = zip(offset, ctx.dilation, ctx.stride, grad.shape[2:], strict=False)
        read = [slice(j * apart, j * apart + (count - 1) * step + 1, step) for j, apart, step, count in each]
        whole[:, :, *read] += grad[..., own]
    return whole, None, None, None


unfold.register_autograd(_gradient, setup_context=_keep)
