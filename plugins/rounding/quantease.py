"""QuantEase: optimization-based quantization for language models (arXiv:2309.01885).

Coordinate descent on `tr((W - Q) H (W - Q)^T)`, one column of all rows at a time, over and over; no inverse of H:

    u = [ (W H)_j - sum over k != j of  Q_k H_kj ] / H_jj;   Q_j = Q(u)

On every third sweep a column is left at u: it moves on without being rounded, and the others answer to where it
wants to be. The sweeps start from Q = W, so the first one rounds each column with the errors of those before it, and
the last ones round.

Shapes: W_NK weight; H_KK; scale and zero `[N, K / group_size]`.
Differs from the paper: ranges are searched (`clip_steps=1`: from min to max), weighed by the diagonal of H, and groups
have their own; the last two sweeps round, so that the last starts from a feasible point; it ends early when no value
moves. The form with outliers in a matrix of their own is `quantease-outlier`.
"""

from dataclasses import dataclass

from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.descent_core import Levels, gradient, sweep
from hf_quant.plugins.rounding.gptq import living
from hf_quant.qtensor import QTensor, nearest
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import LayerMse, Quadratic
from hf_quant.stages.range import Range
from hf_quant.stages.solver import Nearest


@dataclass(frozen=True, slots=True)
class CyclicDescent:
    """`sweeps` over the columns, of which every third (but not the last two) relaxes."""

    sweeps: int = 24

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ConfigError(f"sweeps={self.sweeps!r}: at least 1")

    def refuses(self, spec: Spec) -> str | None:
        """Takes scalar grids whose blocks are one row high."""
        if spec.grid.vector != 1:
            return "coordinate descent takes scalar grids only"
        return None if spec.block[0] == 1 else "every row is solved for itself: a block must be one row high"

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """See `Solver.solve`; ranges are those of the original weights."""
        if quadratic is None or not bool(quadratic.H_KK.diagonal().any()):
            return Nearest().solve(W_NK, spec, fit, None)
        W_NK, quadratic = living(W_NK, quadratic)
        start = nearest(W_NK, *fit.fit(W_NK, spec, quadratic.H_KK.diagonal()), spec)
        levels, Q_KN, codes_KN = Levels.of(start), W_NK.T.contiguous(), start.codes.T.contiguous()
        G_KN = gradient(W_NK, W_NK, quadratic).T.contiguous()
        for index in range(self.sweeps):
            relaxed = index % 3 == 1 and index < self.sweeps - 2
            if not sweep(Q_KN, codes_KN, G_KN, quadratic.H_KK, None if relaxed else levels) and not relaxed:
                break
        return QTensor(codes_KN.T.contiguous(), start.scale, start.zero, spec, start.shape)


@method(
    "quantease",
    paper=Paper("2309.01885", "QuantEase: Optimization-based Quantization for Language Models"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="layer error never rises between rounding sweeps; it and KL no higher than gptq's at 3 bits, a row a scale",
)
def quantease(
    bits: int = 4, group_size: int = 128, symmetric: bool = False, clip_steps: int = 24, sweeps: int = 24
) -> Recipe:
    """LayerMse solved by cyclic coordinate descent."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        objective=LayerMse(),
        solver=CyclicDescent(sweeps),
    )
