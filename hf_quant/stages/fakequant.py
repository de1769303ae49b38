"""FakeQuant: a learnable map from a float weight to its rounded value, for training and reconstruction."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_quant.grids import FloatGrid, IntGrid
from hf_quant.qtensor import QTensor
from hf_quant.runtime.branches import Branch
from hf_quant.spec import Spec

Learned = tuple[nn.Parameter, float]  # what is learned, and its learning rate


class FakeQuant(nn.Module, ABC):
    """A parametrization of `weight` while it is learned (`torch.nn.utils.parametrize`); never saved.

    Invariant: once `anneal(1.0)` was called, `export(W).dequantize() == forward(W)` to the bit (without the
    branch). A later `anneal(less)` goes on learning where it was.
    """

    @abstractmethod
    def forward(self, W_NK: Tensor) -> Tensor:
        """The value the layer computes with, float32, differentiable in what is learned."""

    @abstractmethod
    def export(self, W_NK: Tensor) -> QTensor:
        """The codes that stand for `forward(W_NK)`."""

    @abstractmethod
    def learned(self) -> Sequence[Learned]:
        """Every parameter that is learned, with its learning rate."""

    def branch(self) -> Branch | None:
        """What is learned beside the codes and stays in full precision, if anything; `forward` includes it."""
        return None

    def anneal(self, progress: float) -> Tensor | None:
        """Told before each step how far training is (0 .. 1); returns a penalty to add to the loss, or None.

        A penalty is in units of the loss at the start, so that its weight means the same for every model.
        """
        return None

    def before_step(self) -> None:
        """May change the gradients, which are those of the loss alone when `anneal` gave no penalty."""

    def after_step(self) -> None:
        """May put what was learned back to where it is allowed."""


class Rounding(Protocol):
    """Makes the FakeQuant of one weight (AdaRound, FlexRound, LSQ, LR-QAT, ...)."""

    def refuses(self, spec: Spec) -> str | None:
        """None when it can round onto this spec, else the reason (asked at plan time)."""

    def start(self, W_NK: Tensor, q: QTensor, generator: torch.Generator) -> FakeQuant:
        """Begins at what the solver gave: before any step `export(W_NK)` is `q` or as near as the form allows.

        `generator` (on the CPU) is the only source of what it draws at random, now or later.
        """


def refuses_grid(spec: Spec) -> str | None:
    """None for what gradients can work on here: integer grids with float scales and no float zero points."""
    if not isinstance(spec.grid, IntGrid):
        return f"learned rounding takes integer grids, not {type(spec.grid).__name__}"
    if spec.outer:
        return "learned rounding takes no rotated weights and no scale of the whole tensor"
    if not isinstance(spec.scale, FloatGrid):
        return f"learned rounding takes scales of a float type, not {type(spec.scale).__name__}"
    return "learned rounding takes integer zero points or none" if spec.zero == "float" else None


def bounds(spec: Spec) -> tuple[int, int]:
    """Smallest and largest value of an integer grid."""
    assert isinstance(spec.grid, IntGrid)  # noqa: S101  see `refuses_grid`
    return spec.grid.low, spec.grid.high


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, hard: Tensor) -> Tensor:  # noqa: ANN401
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grads[0], None


def exactly(x: Tensor, hard: Tensor) -> Tensor:
    """`hard` to the bit, with the gradient of `x` (straight-through; `x + (hard - x)` would be off by a rounding)."""
    result: Tensor = _Through.apply(x, hard)  # type: ignore[no-untyped-call]
    return result
