"""Rotating, scaling, shifting: what is done to a float layer's input while it runs, until a quantized layer does it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.errors import UnsupportedModel
from hf_quant.hadamard import Hadamard
from hf_quant.operators import need_operator


@dataclass(frozen=True, slots=True)
class Rotating:
    """A forward pre-hook, the first of its layer: whoever watches the layer sees the rotated input."""

    rotation: Hadamard

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """`x -> x R`."""
        return torch.ops.hf_quant.hadamard(args[0], self.rotation.size, self.rotation.seed, False), *args[1:]


@torch.no_grad()
def rotate_input(module: nn.Module, rotation: Hadamard) -> None:
    """Rotate a float layer's input from now on, and its weight's columns with it: `x W^T = (x R) (W R)^T`.

    Raises:
        UnsupportedModel: the blocks of the rotation do not divide the input.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101  a linear layer's
    W_NK = weight.T if type(module).__name__ == "Conv1D" else weight
    if (reason := rotation.refuses(W_NK.shape[1])) is not None:
        raise UnsupportedModel(f"an input cannot be rotated: {reason}")
    need_operator("hadamard")
    rotated = torch.ops.hf_quant.hadamard(W_NK.double(), rotation.size, rotation.seed, False)
    W_NK.data.copy_(rotated.to(weight.dtype))
    module.register_forward_pre_hook(Rotating(rotation), prepend=True)


def rotation_of(module: nn.Module) -> Hadamard | None:
    """The rotation of a float layer's input, if it has one."""
    return next((h.rotation for h in module._forward_pre_hooks.values() if isinstance(h, Rotating)), None)


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """A forward pre-hook, before a shift: multiplies the input's channels."""

    scale_K: Tensor

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """`x -> x p`."""
        return args[0] * self.scale_K.to(args[0]), *args[1:]


@torch.no_grad()
def scale_input(module: nn.Module, s_K: Tensor) -> None:
    """Divide a float layer's input by s from now on, and multiply its weight's columns by what that really is.

    Raises:
        UnsupportedModel: the input is rotated, scaled or shifted already: a quantized layer scales once, and first.
    """
    if any(isinstance(h, Rotating | Scaling | Shifting) for h in module._forward_pre_hooks.values()):
        raise UnsupportedModel(
            "the input of a layer cannot be scaled while the model runs after it was rotated, scaled or shifted there: "
            "let the transform that scales come first"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101  a linear layer's
    W_NK = weight.T if type(module).__name__ == "Conv1D" else weight
    scale_K = (1 / s_K.double()).to(weight)
    W_NK.data.copy_((W_NK.double() / scale_K.double()).to(weight.dtype))
    module.register_forward_pre_hook(Scaling(scale_K))


def scale_of(module: nn.Module) -> Tensor | None:
    """What a float layer's input is multiplied by, if it is."""
    return next((h.scale_K for h in module._forward_pre_hooks.values() if isinstance(h, Scaling)), None)


@dataclass(frozen=True, slots=True, eq=False)
class Shifting:
    """A forward pre-hook, after a rotation: adds a constant to the input."""

    shift_K: Tensor

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """`x -> x + t`."""
        return args[0] + self.shift_K.to(args[0]), *args[1:]


def shift_input(module: nn.Module, shift_K: Tensor) -> None:
    """Shift a float layer's input from now on, and take what it does out of the output: `x W^T` stays as it is."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101  a linear layer's
    of_shift_N = (weight.T if type(module).__name__ == "Conv1D" else weight) @ shift_K.to(weight)
    module.register_forward_pre_hook(Shifting(shift_K))
    module.register_forward_hook(lambda _m, _args, y: y - of_shift_N)


def shift_of(module: nn.Module) -> Tensor | None:
    """The shift of a float layer's input, if it has one."""
    return next((h.shift_K for h in module._forward_pre_hooks.values() if isinstance(h, Shifting)), None)
