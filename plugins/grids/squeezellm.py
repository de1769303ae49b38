"""SqueezeLLM: a codebook for every row, fitted where the loss is sensitive (arXiv:2306.07629).

    minimize  sum_nk F_nk (w_nk - c_n[code_nk])^2  over 2^b levels c_n a row,   F = sum over samples (d loss / d w)^2
    W = Q + S,  S sparse: the weights with the largest F, and of the others those with the largest magnitude, take no
    part in the fit and are stored beside it

Shapes: W_NK weight; F_NK squared gradients; codebook `[N, K / group_size, 2^bits]` in float16; S_NK in CSR.
Differs from the paper: clusters start from the best cut of 64 quantile bins (an exact dynamic program), from quantiles
and from equal distances, and the best end is kept, instead of k-means++; groups within a row are possible; S holds
what Q leaves of a weight, not the weight, so that the sum is exact; a share of the weights is taken from each matrix,
where the paper sets thresholds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.codebooks import fit_codebooks
from hf_quant.errors import ConfigError
from hf_quant.grids import CodebookGrid, FloatGrid
from hf_quant.method import Paper, method
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.runtime.branches import Branch, Sparse
from hf_quant.spec import Spec
from hf_quant.stages.objective import Fisher, FisherMse, Quadratic
from hf_quant.stages.range import Range
from hf_quant.stats import Stat, Stats


@dataclass(frozen=True, slots=True)
class Outliers:
    """The sparse part: `sensitive` and then `large` of the weights of a matrix, as shares; a repair of what is left."""

    large: float
    sensitive: float
    fisher: Fisher | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(s, int | float) and 0 <= s <= 0.1 for s in (self.large, self.sensitive)):
            raise ConfigError(f"sparse={self.large!r}, sparse_sensitive={self.sensitive!r}: shares from 0 to 0.1")

    @property
    def needs(self) -> tuple[Stat, ...]:
        """Squared gradients, where sensitive weights are asked for."""
        return () if self.fisher is None else (self.fisher,)

    def mask(self, W_NK: Tensor, F_NK: Tensor | None) -> Tensor:
        """Which weights are stored apart. Their number depends on the shape alone."""
        taken = torch.zeros(W_NK.numel(), dtype=torch.bool, device=W_NK.device)
        shares = [(self.sensitive, F_NK), (self.large, W_NK.abs())]
        for share, weight_NK in shares:
            if weight_NK is not None:
                left = weight_NK.flatten().masked_fill(taken, -1)
                taken[left.topk(round(share * left.numel())).indices] = True
        return taken.view(W_NK.shape)

    def repair(self, W_NK: Tensor, q: QTensor, stats: Stats) -> tuple[Branch, ...]:
        """See `Repair.repair`."""
        square = stats[self.fisher]["square"].float() if self.fisher in stats else None  # type: ignore[index]
        mask = self.mask(W_NK, square)
        return (Sparse.of(W_NK - q.dequantize(), mask),) if bool(mask.any()) else ()


@dataclass(frozen=True, slots=True)
class KMeans:
    """Levels and codes by k-means, every weight counting as `F_NK` says, or its input as diag H, or all alike.

    Attributes:
        apart: weights that a repair stores beside the codes: they do not count.
    """

    apart: Outliers | None = None

    def refuses(self, spec: Spec) -> str | None:
        """Stored codebooks only."""
        return None if isinstance(spec.grid, CodebookGrid) else "k-means fits stored codebooks, nothing else"

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """The range stage has nothing to choose here: levels are what is fitted."""
        importance = None
        if quadratic is not None:
            weights = quadratic.H_KK.diagonal() if quadratic.F_NK is None else quadratic.F_NK
            importance = weights.expand(W_NK.shape)
        if self.apart is not None:
            mask = self.apart.mask(W_NK.float(), None if quadratic is None else quadratic.F_NK)
            importance = torch.ones_like(W_NK, dtype=torch.float32) if importance is None else importance
            importance = importance.masked_fill(mask, 0)
        return fit_codebooks(W_NK, spec, importance)


@method(
    "squeezellm",
    paper=Paper("2306.07629", "SqueezeLLM: Dense-and-Sparse Quantization"),
    domains={"llm"},
    claim="3 bits: KL below rtn's in groups of 128; a weight apart is exact",
)
def squeezellm(
    bits: int = 4, group_size: int = -1, sensitive: bool = True, sparse: float = 0.0, sparse_sensitive: float = 0.0
) -> Recipe:
    """K-means a row, weighted by the Fisher diagonal (`sensitive=False`: all weights alike, without data).

    The paper's dense-and-sparse form has `sparse=0.004, sparse_sensitive=0.0005`.
    """
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise ConfigError(f"group_size={group_size!r}: a positive integer, or -1 for one codebook per output channel")
    weights = Spec(grid=CodebookGrid(bits), block=(1, group_size), scale=FloatGrid("float16"))
    if sparse_sensitive and not sensitive:
        raise ConfigError("sparse_sensitive takes weights by their sensitivity, which sensitive=False leaves out")
    apart = Outliers(sparse, sparse_sensitive, Fisher() if sparse_sensitive else None)
    some = apart.large > 0 or apart.sensitive > 0
    return Recipe(
        weights=weights,
        objective=FisherMse() if sensitive else None,
        solver=KMeans(apart if some else None),
        repairs=(apart,) if some else (),
    )
