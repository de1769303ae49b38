"""CoreQ: learning-free mismatch correction and successive rounding for quantization (arXiv:2602.05902).

Of the drift `X~ - X` of a layer's inputs only the part that is linear in X can be made up for by other weights,
`M X` with `M = D (H + l I)^-1`, `D = (2/N) (X~ - X) X^T`. The target moves by a share of it that a layer earns:

    W* = W (I + c M),   c = |W M X|^2 / |W (X~ - X)|^2       in [0, 1]

and `tr((W* - Q) H (W* - Q)^T)` is rounded column by column as in GPTQ, with the `beam` cheapest partial solutions of
every row kept and branched to the two nearest levels.

Shapes: W_NK weight; H_KK, D_KK, DD_KK = (2/N) (X~ - X) (X~ - X)^T; M_KK; scale and zero `[N, K / group_size]`.
Differs from the paper: no code of the authors was found; c is the share of the mismatch's energy that M carries, a
reconstruction of the closed form that the abstract names; ranges are fixed on W* before the search, columns go by
falling `H_ii`; a row that the beam leaves worse than the greedy choice keeps the latter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.coreq_core import beam
from hf_quant.plugins.rounding.descent_core import Levels
from hf_quant.plugins.rounding.gptq import living
from hf_quant.plugins.rounding.gptq_core import factorize
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import MismatchMse, Quadratic
from hf_quant.stages.range import Range
from hf_quant.stages.solver import Nearest


def corrected(W_NK: Tensor, quadratic: Quadratic, damp: float) -> Tensor:
    """`W*`; W itself when nothing drifts."""
    H, D, DD = quadratic.H_KK, quadratic.D_KK, quadratic.DD_KK
    if D is None or DD is None:
        return W_NK
    damped = H + damp * H.diagonal().mean() * torch.eye(len(H), device=H.device)
    moved = torch.linalg.solve(damped, (W_NK @ D).T).T  # W M
    absorbed, all_of_it = ((moved @ H) * moved).sum(), ((W_NK @ DD) * W_NK).sum()
    return W_NK + moved * (absorbed / all_of_it).clamp(0, 1) if all_of_it > 0 else W_NK


@dataclass(frozen=True, slots=True)
class SuccessiveRounding:
    """GPTQ's loop on the corrected target, with a beam.

    Attributes:
        beam: partial solutions kept of each row; 1 is the greedy choice.
        damp: added to the diagonal of H, relative to its mean.
    """

    beam: int = 8
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.beam < 1 or not 0 < self.damp < 1:
            raise ConfigError(f"beam={self.beam!r}, damp={self.damp!r}: a beam of at least 1, damp between 0 and 1")

    def refuses(self, spec: Spec) -> str | None:
        """Takes scalar grids whose blocks are one row high."""
        if spec.grid.vector != 1:
            return "CoreQ takes scalar grids only"
        return None if spec.block[0] == 1 else "every row is solved for itself: a block must be one row high"

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """See `Solver.solve`."""
        if quadratic is None or not bool(quadratic.H_KK.diagonal().any()):
            return Nearest().solve(W_NK, spec, fit, None)
        W_NK, quadratic = living(W_NK, quadratic)
        W_NK, H = corrected(W_NK, quadratic, self.damp), quadratic.H_KK
        order = H.diagonal().argsort(descending=True, stable=True)
        U = factorize(H[order][:, order], self.damp)
        importance = torch.empty_like(H[0]).index_copy_(0, order, U.diagonal().square().reciprocal())
        scale, zero = fit.fit(W_NK, spec, importance)
        shape, size = (W_NK.shape[0], W_NK.shape[1]), spec.block_size((W_NK.shape[0], W_NK.shape[1]))[1]
        levels = Levels(
            spec.grid,
            scale.T.contiguous()[:, :, None],
            None if zero is None else zero.T.contiguous()[:, :, None],
            (order // size).tolist(),
        )
        codes = beam(W_NK.T[order].contiguous(), U, levels, self.beam)
        codes_NK = torch.empty_like(codes).index_copy_(0, order, codes).T.contiguous()
        return QTensor(codes_NK, scale, zero, spec, shape)


@method(
    "coreq",
    paper=Paper("2602.05902", "CoreQ: Learning-Free Mismatch Correction and Successive Rounding for Quantization"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="no row's triangular cost above the greedy choice; KL no higher than gptq's with 16 calibration sequences",
)
def coreq(
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    damp: float = 0.01,
    clip_steps: int = 24,
    beam: int = 8,
) -> Recipe:
    """MismatchMse solved by successive rounding (`beam=1`: CoreQ, more: K-CoreQ)."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        objective=MismatchMse(),
        solver=SuccessiveRounding(beam, damp),
    )
