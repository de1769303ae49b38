"""The type in which a CPU multiplies: it sums products of bfloat16 in float32, or has instructions of float32 only."""

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEW = 4  # rows up to which torch's bfloat16 product, which then reads half the bytes, is as fast as float32's
SLICE = 1 << 19  # weights widened at once: they stay in the cache


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has products of bfloat16; an x86 without them takes 4 times as long for them as for float32."""
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported()


def sums() -> str:
    """The type of the products that `operand` makes of many rows in bfloat16."""
    return "bfloat16" if multiplies_bfloat16() else "float32"


def operand(x_TK: Tensor) -> Tensor:
    """What to multiply in place of x: x, or its float32 where that product is faster, and as exact before rounding."""
    wide = x_TK.device.type == "cpu" and x_TK.dtype == torch.bfloat16 and len(x_TK) > FEW
    return x_TK.float() if wide and not multiplies_bfloat16() else x_TK


def product(x_TK: Tensor, W_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`x W^T + bias` in their type."""
    x = operand(x_TK)
    if x is x_TK:
        return F.linear(x_TK, W_NK, bias_N)
    N, K = W_NK.shape
    y_TN = x.new_empty(len(x), N)
    step = max(1, SLICE // max(1, K))
    for first in range(0, N, step):
        torch.mm(x, W_NK[first : first + step].float().T, out=y_TN[:, first : first + step])
    return (y_TN if bias_N is None else y_TN.add_(bias_N)).to(x_TK.dtype)


def widened() -> AbstractContextManager[object]:
    """Inside, `F.linear` in bfloat16 is `product`, with its gradient: so models run that are not ours."""
    return nullcontext() if multiplies_bfloat16() else _Widened()


class _Widened(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  torch's own signature
        return (_linear if func is F.linear else func)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not input.dtype == weight.dtype == torch.bfloat16:
        return F.linear(input, weight, bias)
    y_TN: Tensor = _Product.apply(input.reshape(-1, input.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return y_TN.view(*input.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """`product`, whose gradients are such products: it keeps nothing that is widened, and may be derived twice."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, W_NK: Tensor, bias_N: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x_TK, W_NK)
        return product(x_TK, W_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x_TK, W_NK = ctx.saved_tensors
        of_x, of_W, of_bias = ctx.needs_input_grad
        return (
            _Product.apply(grad_TN, W_NK.T, None) if of_x else None,  # type: ignore[no-untyped-call]
            _Product.apply(grad_TN.T, x_TK.T, None) if of_W else None,  # type: ignore[no-untyped-call]
            grad_TN.sum(0) if of_bias else None,
        )
