"""GPFQ: greedy path-following quantization with provable guarantees (arXiv:2201.11113).

Column by column, once, each neuron follows the path of its full-precision output; with inputs x~_t in full precision
and x_t on the quantized path, one vector over the samples each:

    u += w_t x~_t;  q_t = Q(<u, x_t> / |x_t|^2);  u -= q_t x_t

Only inner products matter, so the Gram matrices `H = (2/N) X X^T`, `D = (2/N) (X~ - X) X^T` are enough:

    <u, x_t> = w_t (H + D)_tt + sum over s < t of  w_s D_st + (w_s - q_s) H_st

which is the loop of GPTQ with other factors: no error is spread by an inverse, past ones are seen through H itself.

Shapes: W_NK weight; H_KK and D_KK; scale `[N, K / group_size]`.
Differs from the paper: scales are searched for the least weight error of each group (`clip_steps=1`: from the largest
magnitude) where the paper has one step a layer; no sparse alphabet, no stochastic rounding and no bias correction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.gptq import living
from hf_quant.plugins.rounding.gptq_core import Term, lazy_blocks, solve_columns
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import AsymmetricMse, Quadratic
from hf_quant.stages.range import Range
from hf_quant.stages.solver import Nearest


@dataclass(frozen=True, slots=True)
class PathFollowing:
    """One greedy pass; it never looks at a column to come."""

    def refuses(self, spec: Spec) -> str | None:
        """Takes scalar grids whose blocks are one row high."""
        if spec.grid.vector != 1:
            return "GPFQ takes scalar grids only"
        return None if spec.block[0] == 1 else "GPFQ solves every row for itself: a block must be one row high"

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """See `Solver.solve`; ranges are those of the original weights."""
        if quadratic is None or not bool(quadratic.H_KK.diagonal().any()):
            return Nearest().solve(W_NK, spec, fit, None)
        W_NK, quadratic = living(W_NK, quadratic)
        N, K = W_NK.shape
        scale, zero = fit.fit(W_NK, spec)
        size, S, Z = spec.block_size((N, K))[1], scale.T.contiguous(), None if zero is None else zero.T.contiguous()
        W_KN, H, D, per_input = W_NK.T.contiguous(), quadratic.H_KK, quadratic.D_KK, quadratic.H_KK.diagonal()
        terms = [Term(H.triu(1) / per_input, lambda column: column.original - column.value)]
        if D is not None:
            terms.append(Term(D.triu(1) / per_input, lambda column: column.original))
        codes = solve_columns(
            W_KN.clone() if D is None else W_KN * (1 + D.diagonal() / per_input)[:, None],
            torch.eye(K, device=H.device),  # an error is seen, not spread
            spec.grid,
            lazy_blocks(K, K),
            lambda i, _: (S[i // size], None if Z is None else Z[i // size]),
            terms,
            original_KN=W_KN,
        )
        return QTensor(codes.T.contiguous(), scale, zero, spec, (N, K))


@method(
    "gpfq",
    paper=Paper("2201.11113", "Post-training Quantization for Neural Networks with Provable Guarantees"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="relative output error falls as a layer gets wider; KL no higher than rtn's at 4 bits",
)
def gpfq(bits: int = 4, group_size: int = 128, symmetric: bool = True, clip_steps: int = 24) -> Recipe:
    """AsymmetricMse solved by one greedy pass."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        objective=AsymmetricMse(),
        solver=PathFollowing(),
    )
