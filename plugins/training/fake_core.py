"""What the trained roundings share beside `stages.fakequant`: scaled gradients and low-rank terms."""

import torch
from torch import Tensor, nn

from hf_quant.errors import ConfigError
from hf_quant.qtensor import QTensor
from hf_quant.spec import Spec
from hf_quant.stages.fakequant import bounds, exactly, latent

NEAR = 0.25  # how far from the solver's code a weight starts, in steps: of those at a threshold noise would flip many


def near_codes(W_NK: Tensor, q: QTensor) -> Tensor:
    """`latent`, well inside the cells."""
    return latent(W_NK, q, NEAR)


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied (LSQ's normalization of step sizes)."""
    return exactly(x * factor, x.detach())


def ratio_rate(rate: float, spec: Spec) -> float:
    """Rate of a ratio of step sizes that moves the ends of the grid by `rate` steps: half of it for every bit more."""
    low, high = bounds(spec)
    return 2 * rate / (high - low + 1)


@torch.no_grad()
def keep_positive(ratio: Tensor) -> None:
    """After a step: no step size falls below a tenth of the one it began with."""
    ratio.clamp_min_(0.1)


def check_rank(rank: int) -> None:
    """Raises `ConfigError` for what is no rank."""
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"rank={rank!r}: a positive integer")


def refuses_rank(rank: int, shape: tuple[int, int], what: str = "matrix") -> str | None:
    """None for a rank that a matrix `[N, K]` can have (see `ShapeBound`)."""
    most = min(shape)
    if rank <= most:
        return None
    return (
        f"rank={rank} is above that of the {list(shape)} {what}; use rank={most} or less, or keep the layer in full "
        "precision (skip)"
    )


class LowRankTerm(nn.Module):
    """`(alpha / r) B A`, zero at the start: A Gaussian over `sqrt(K)`, B zero. See `refuses_rank`."""

    def __init__(self, shape: tuple[int, int], rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        n, k = shape
        self.A = nn.Parameter(torch.randn(rank, k, generator=generator) / k**0.5)
        self.B = nn.Parameter(torch.zeros(n, rank))
        self.scaling = alpha / rank

    def forward(self) -> Tensor:
        """`[N, K]`."""
        return self.scaling * (self.B @ self.A)
