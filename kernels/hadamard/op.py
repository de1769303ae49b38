"""`hf_quant::hadamard`: one operator with a fake and a gradient, so a rotated layer is two nodes for `torch.compile`.

`Hadamard.apply` is the reference. Whatever rotates inputs at run time comes here: rotated layers, and kernels for
weights that are stored rotated. A faster version for a device is a `Kernel` of `KERNELS`, before `Dense`.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from hf_quant.hadamard import Hadamard
from hf_quant.kernels.hadamard.dense import Dense
from hf_quant.kernels.hadamard.gpu import Triton


class Kernel(Protocol):
    """A faster `Hadamard.apply` and `inverse` for some inputs."""

    def supports(self, x: Tensor, size: int) -> str | None:
        """None when it can transform x, else the reason why not."""

    def run(self, x: Tensor, size: int, seed: int | None, inverse: bool) -> Tensor:
        """What the reference gives, up to rounding."""


KERNELS: tuple[Kernel, ...] = (Triton(), Dense())  # tried in order


@torch.library.custom_op("hf_quant::hadamard", mutates_args=())
def hadamard(x: Tensor, size: int, seed: int | None, inverse: bool) -> Tensor:
    """See `hf_quant.hadamard.Hadamard`; `inverse` undoes it."""
    y = next(k for k in KERNELS if k.supports(x, size) is None).run(x, size, seed, inverse)
    return y.clone() if y.data_ptr() == x.data_ptr() else y  # an operator's result is no alias of its input


def rotate(x: Tensor, rotation: Hadamard) -> Tensor:
    """`x R`, in x's type, by the operator."""
    rotated: Tensor = hadamard(x, rotation.size, rotation.seed, False)
    return rotated


@hadamard.register_fake
def _(x: Tensor, size: int, seed: int | None, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401  torch's own signature
    ctx.how = inputs[1:]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
    size, seed, inverse = ctx.how
    return hadamard(grad, size, seed, not inverse), None, None, None


hadamard.register_autograd(_gradient, setup_context=_keep)
