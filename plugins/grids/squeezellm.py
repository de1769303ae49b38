"""SqueezeLLM: a codebook for every row, fitted where the loss is sensitive (arXiv:2306.07629).

    minimize  sum_nk F_nk (w_nk - c_n[code_nk])^2  over 2^b levels c_n a row,   F = sum over samples (d loss / d w)^2

Shapes: W_NK weight; F_NK squared gradients; codebook `[N, K / group_size, 2^bits]` in float16.
Differs from the paper: clusters start from the best cut of 64 quantile bins (an exact dynamic program), from quantiles
and from equal distances, and the best end is kept, instead of k-means++; groups within a row are possible.
"""

from dataclasses import dataclass

from torch import Tensor

from hf_quant.codebooks import fit_codebooks
from hf_quant.errors import ConfigError
from hf_quant.grids import CodebookGrid, FloatGrid
from hf_quant.method import Paper, method
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec
from hf_quant.stages.objective import FisherMse, Quadratic
from hf_quant.stages.range import Range


@dataclass(frozen=True, slots=True)
class KMeans:
    """Levels and codes by k-means, every weight counting as `F_NK` says, or its input as diag H, or all alike."""

    def refuses(self, spec: Spec) -> str | None:
        """Stored codebooks only."""
        return None if isinstance(spec.grid, CodebookGrid) else "k-means fits stored codebooks, nothing else"

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """The range stage has nothing to choose here: levels are what is fitted."""
        importance = None
        if quadratic is not None:
            weights = quadratic.H_KK.diagonal() if quadratic.F_NK is None else quadratic.F_NK
            importance = weights.expand(W_NK.shape)
        return fit_codebooks(W_NK, spec, importance)


@method(
    "squeezellm",
    paper=Paper("2306.07629", "SqueezeLLM: Dense-and-Sparse Quantization"),
    domains={"llm"},
    claim="3 bits: KL below rtn's in groups of 128, and below k-means without sensitivities",
)
def squeezellm(bits: int = 4, group_size: int = -1, sensitive: bool = True) -> Recipe:
    """K-means a row, weighted by the Fisher diagonal (`sensitive=False`: all weights alike, without data)."""
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise ConfigError(f"group_size={group_size!r}: a positive integer, or -1 for one codebook per output channel")
    weights = Spec(grid=CodebookGrid(bits), block=(1, group_size), scale=FloatGrid("float16"))
    return Recipe(weights=weights, objective=FisherMse() if sensitive else None, solver=KMeans())
