"""What the trained roundings share beside `stages.fakequant`: scaled gradients and low-rank terms."""

import torch
from torch import Tensor, nn

from hf_quant.stages.fakequant import exactly


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
