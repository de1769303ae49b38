"""What the trained roundings share: rounding with a gradient, scales that are stored, and where training begins."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_quant.grids import FloatGrid, IntGrid
from hf_quant.qtensor import QTensor, expand, round_scale
from hf_quant.spec import Spec
from hf_quant.stages.fakequant import exactly


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


def refuses(spec: Spec) -> str | None:
    """None for integers with float scales and integer zero points or none, a scale for (part of) a row."""
    if not isinstance(spec.grid, IntGrid):
        return f"training takes integer grids, not {type(spec.grid).__name__}"
    if not isinstance(spec.scale, FloatGrid) or spec.tensor_scale:
        return "training takes scales of one float type"
    return "training takes integer zero points or none" if spec.zero == "float" else None


def stored(scale: Tensor, spec: Spec) -> Tensor:
    """The scale as it is saved, with the gradient of the one that is learned."""
    return exactly(scale, round_scale(scale.detach(), spec))


def grid_of(spec: Spec) -> IntGrid:
    """The integer grid; `refuses` has seen to it."""
    assert isinstance(spec.grid, IntGrid)  # noqa: S101
    return spec.grid


def latent(W_NK: Tensor, q: QTensor) -> Tensor:
    """Grid units `W / s + z`, moved no further than into the cell of the solver's code, so that they round to it."""
    steps = W_NK.float() / expand(q.scale, q.spec, q.shape)
    if q.zero is not None:
        steps = steps + expand(q.zero, q.spec, q.shape)
    values = q.spec.grid.decode(q.codes)
    return values + (steps - values).clamp(-0.49, 0.49)


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied (LSQ's normalization of step sizes)."""
    return exactly(x * factor, x.detach())


class LowRankTerm(nn.Module):
    """`(alpha / r) B A`, zero at the start: A Gaussian over `sqrt(K)`, B zero."""

    def __init__(self, shape: tuple[int, int], rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        n, k = shape
        rank = min(rank, n, k)
        self.A = nn.Parameter(torch.randn(rank, k, generator=generator) / k**0.5)
        self.B = nn.Parameter(torch.zeros(n, rank))
        self.scaling = alpha / rank

    def forward(self) -> Tensor:
        """`[N, K]`."""
        return self.scaling * (self.B @ self.A)
