"""LRQ: FlexRound with low-rank weight-scaling matrices (arXiv:2407.11534).

    W^ = s exp(r) (clamp(round(W / (s exp(r + L U + d_N + e_K)) + z)) - z),   all learned; L, d and e zero at the start

A divisor for every weight, as in `flexround`, from `rank (N + K) + N + K` numbers instead of `N K + N`.

Shapes: W_NK weight; L `[N, rank]`; U `[rank, K]`; d `[N, 1]`; e `[1, K]`; s, z and r `[N, K / group_size]`.
Differs from the paper: as `flexround` does; U is Gaussian over sqrt(rank); rank K / 8 unless given.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.rounding.flexround import FlexRoundFake, blockwise
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec
from hf_quant.stages.fakequant import FakeQuant, refuses_grid


class LowRankDivisor(nn.Module):
    """`L U + d + e`: the logarithm of what a weight is divided by."""

    def __init__(self, shape: tuple[int, int], rank: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        n, k = shape
        self.L = nn.Parameter(torch.zeros(n, rank, device=device))
        self.U = nn.Parameter((torch.randn(rank, k, generator=generator) / rank**0.5).to(device))
        self.d = nn.Parameter(torch.zeros(n, 1, device=device))
        self.e = nn.Parameter(torch.zeros(1, k, device=device))

    def forward(self) -> Tensor:
        """`[N, K]`."""
        log_NK: Tensor = self.L @ self.U + self.d + self.e
        return log_NK


@dataclass(frozen=True, slots=True)
class Lrq:
    """A divisor for every weight, of low rank.

    Attributes:
        lr: learning rate of the divisor's parts at 4 bits.
        scale_lr: of the logarithm of the steps.
        rank: of L U; None: K / 8.
    """

    lr: float = 3e-3
    scale_lr: float = 1e-3
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ConfigError(f"rank={self.rank!r}: a positive integer, or None for an eighth of the columns")

    def refuses(self, spec: Spec) -> str | None:
        """Takes integer grids."""
        return refuses_grid(spec)

    def start(self, W_NK: Tensor, q: QTensor, generator: torch.Generator) -> FakeQuant:
        """See `Rounding.start`."""
        rank = min(self.rank or max(1, q.shape[1] // 8), *q.shape)
        divisor = LowRankDivisor(q.shape, rank, generator, W_NK.device)
        return FlexRoundFake(W_NK, q, divisor, self.lr, self.scale_lr)


@method(
    "lrq",
    paper=Paper(
        "2407.11534",
        "LRQ: Optimizing Post-Training Quantization for Large Language Models by Learning Low-Rank Weight-Scaling "
        "Matrices",
    ),
    domains={"llm", "vit"},
    claim="KL at most adaround's at 4 bits a row, at equal steps, from a fraction of flexround's learned numbers",
)
def lrq(
    bits: int = 4,
    act_bits: int | None = None,
    group_size: int = 128,
    per_tensor: bool = False,
    steps: int = 300,
    lr: float = 3e-3,
    scale_lr: float = 1e-3,
    rank: int | None = None,
    clip_steps: int = 24,
) -> Recipe:
    """Learned low-rank divisors of the weights, block by block; see `flexround`."""
    return blockwise(Lrq(lr, scale_lr, rank), bits, act_bits, group_size, per_tensor, steps, clip_steps)
