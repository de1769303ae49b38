"""FakeQuant: a learnable map from a float weight to its rounded value, for training and reconstruction."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hf_quant.grids import FloatGrid, IntGrid
from hf_quant.qtensor import QTensor, expand, round_scale
from hf_quant.runtime.branches import Branch
from hf_quant.spec import Spec

Learned = tuple[nn.Parameter, float]  # what is learned, and its learning rate
EDGE = 0.49  # how far from its code a weight may start, in steps: short of the threshold


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
        """May change the gradients, which are those of the loss alone when `anneal` gave no penalty.

        Of a float16 model all of them are a constant times as large.
        """

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


@runtime_checkable
class ShapeBound(Protocol):
    """A Rounding that does not fit every matrix of a spec it takes (LR-QAT: a rank that the matrix must have)."""

    def refuses_matrix(self, shape: tuple[int, int], spec: Spec) -> str | None:
        """None when it can round a matrix `[N, K]` onto this spec, else the reason (asked at plan time)."""


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


class Estimator(Protocol):
    """What stands for the derivative of rounding."""

    def round(self, x: Tensor, low: int, high: int) -> Tensor:
        """`clamp(round(x), low, high)` to the bit, with a gradient."""


@dataclass(frozen=True, slots=True)
class Clipped:
    """Straight through inside the range, nothing outside (arXiv:1308.3432, and LSQ's form)."""

    def round(self, x: Tensor, low: int, high: int) -> Tensor:
        """See `Estimator.round`."""
        inside = x.clamp(low, high)
        return exactly(inside, inside.detach().round())


@dataclass(frozen=True, slots=True)
class Straight:
    """Straight through everywhere (plain STE): values beyond the range go on moving."""

    def round(self, x: Tensor, low: int, high: int) -> Tensor:
        """See `Estimator.round`."""
        return exactly(x, x.detach().round().clamp(low, high))


def stored(scale: Tensor, spec: Spec) -> Tensor:
    """The scale as it is saved, with the gradient of the one that is learned."""
    return exactly(scale, round_scale(scale.detach(), spec))


def steps_of(W_NK: Tensor, q: QTensor) -> Tensor:
    """Where the weights lie on their grid: `W / s + z`, in steps."""
    steps = W_NK.float() / expand(q.scale, q.spec, q.shape)
    return steps if q.zero is None else steps + expand(q.zero, q.spec, q.shape)


def latent(W_NK: Tensor, q: QTensor, edge: float = EDGE) -> Tensor:
    """`steps_of`, moved no further than into the cell of the solver's code, so that they round to it.

    `edge` is how far from the code one may lie, in steps: near 0.5 many weights begin at the threshold.
    """
    values = q.spec.grid.decode(q.codes)
    return values + (steps_of(W_NK, q) - values).clamp(-edge, edge)


def values_of(steps: Tensor, scale: Tensor, q: QTensor) -> Tensor:
    """What rounded steps are worth at a scale: `s (steps - z)`, as `QTensor.dequantize` computes it."""
    if q.zero is not None:
        steps = steps - expand(q.zero, q.spec, q.shape)
    return steps * expand(scale, q.spec, q.shape)
