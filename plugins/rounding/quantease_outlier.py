"""QuantEase with outliers: a few weights apart in full precision, chosen together with the codes (arXiv:2309.01885).

    min over Q on the grid, S with k entries   tr(E H E^T),   E = W - S - Q

in turn, from S = the k largest |W|:

    codes:     ranges and coordinate descent of W - S, as `quantease` does it
    outliers:  S <- P_k( S + E H / lambda_max(H) ), a few times;   P_k keeps the k entries of largest magnitude

The second never raises the error, being a projected gradient step no longer than one over the gradient's Lipschitz
constant; the first may, where ranges change, so the S with the least error after it is what stays. Of what outliers
gain, the first choice of S has nearly all: on layers of tiny-lm further turns take off less than 1 %.

Shapes: W_NK weight; S_NK in CSR; H_KK; scale and zero `[N, K / group_size]`.
Differs from the paper: unstructured outliers only, no whole columns; ranges are fitted anew in every turn; the last
descent, with S settled, is a longer one; values of S are rounded to bfloat16, which every type a layer may have holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.gptq import living
from hf_quant.plugins.rounding.quantease import CyclicDescent
from hf_quant.recipe import Recipe
from hf_quant.runtime.branches import Branch, Sparse
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import LayerMse, Quadratic
from hf_quant.stages.range import Range
from hf_quant.stages.solver import Solver
from hf_quant.stats import Gram, Stat, Stats, hessian


def largest(M_NK: Tensor, count: int) -> Tensor:
    """The `count` entries of largest magnitude, all others zero."""
    kept = M_NK.abs().flatten().topk(count).indices
    return torch.zeros_like(M_NK).flatten().index_copy_(0, kept, M_NK.flatten()[kept]).view(M_NK.shape)


def largest_eigenvalue(H_KK: Tensor, iterations: int = 64) -> float:
    """Of a positive semidefinite matrix, from just above: the Rayleigh quotient of power iterations, and 1 % more."""
    v_K = H_KK.sum(1) + H_KK.diagonal()
    for _ in range(iterations):
        v_K = H_KK @ (v_K / v_K.norm().clamp_min(1e-30))
    return 1.01 * float(v_K.norm())


def step(W_NK: Tensor, S_NK: Tensor, Q_NK: Tensor, H_KK: Tensor, count: int, reach: float) -> Tensor:
    """The next S, codes held; `reach` is an upper bound of H's eigenvalues."""
    return largest(S_NK + (W_NK - S_NK - Q_NK) @ H_KK / reach, count)


@dataclass(frozen=True, slots=True)
class SparseOutliers:
    """Takes a share of each matrix apart.

    Attributes:
        share: of the weights, 0 to 0.1.
        rounds: turns between codes and outliers; 0 takes the largest weights.
        steps: of the outliers in a turn.
        solver: of the codes in a turn.
    """

    share: float = 0.01
    rounds: int = 2
    steps: int = 8
    solver: Solver = CyclicDescent(8)
    needs: ClassVar[tuple[Stat, ...]] = (Gram(),)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 0.1 or type(self.rounds) is not int or self.rounds < 0:
            raise ConfigError(
                f"outliers={self.share!r}, rounds={self.rounds!r}: a share from 0 to 0.1, 0 or more turns"
            )

    def choose(self, W_NK: Tensor, H_KK: Tensor, spec: Spec, fit: Range) -> Tensor:
        """S, dense."""
        count = round(self.share * W_NK.numel())
        S_NK = largest(W_NK, count)
        if not (self.rounds and count and bool(H_KK.diagonal().any())):
            return S_NK.bfloat16().float()
        W_NK, quadratic = living(W_NK, Quadratic(H_KK))
        reach, least, best = largest_eigenvalue(quadratic.H_KK), float("inf"), S_NK
        for turn in range(self.rounds + 1):
            Q_NK = self.solver.solve(W_NK - S_NK, spec, fit, quadratic).dequantize()
            E_NK = W_NK - S_NK - Q_NK
            error = float(((E_NK @ quadratic.H_KK) * E_NK).sum())
            if error < least:
                least, best = error, S_NK
            for _ in range(self.steps if turn < self.rounds else 0):
                S_NK = step(W_NK, S_NK, Q_NK, quadratic.H_KK, count, reach)
        return best.bfloat16().float()

    def split(
        self, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> list[tuple[Tensor, tuple[Branch, ...]]]:
        """See `Splitter.split`."""
        H_KK = hessian(stats)
        found: list[tuple[Tensor, tuple[Branch, ...]]] = []
        for W in Ws:
            S_NK = self.choose(W, H_KK, weights, fit)
            mask = S_NK != 0
            found.append((W - S_NK, (Sparse.of(S_NK, mask),) if bool(mask.any()) else ()))
        return found


@method(
    "quantease-outlier",
    paper=Paper("2309.01885", "QuantEase: Optimization-based Quantization for Language Models"),
    domains={"llm", "vit", "vlm", "moe"},
    claim="with 1 % of the weights apart, KL below quantease's at 2 bits in groups of 64",
)
def quantease_outlier(
    bits: int = 3,
    group_size: int = 128,
    symmetric: bool = False,
    outliers: float = 0.01,
    rounds: int = 2,
    clip_steps: int = 24,
    sweeps: int = 24,
) -> Recipe:
    """Outliers apart, the rest by cyclic coordinate descent."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        splitter=SparseOutliers(outliers, rounds),
        objective=LayerMse(),
        solver=CyclicDescent(sweeps),
    )
