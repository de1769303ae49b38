"""COMQ: a backpropagation-free algorithm for post-training quantization (arXiv:2403.07134).

Each weight of a row, `q_rj = s_r (code - z_r)`, and the row's scale are minimized over in turn, everything else held:

    u = X (w_r - q_r);   q_rj <- nearest level to  <x_j, u + x_j q_rj> / |x_j|^2,   by falling |x_j| |w_rj|
    s_r <- <X w_r, X v_r> / |X v_r|^2,   v_r = code - z_r,   after each sweep

Inner products with x_j are rows of the Gram matrix, so H replaces the samples.

Shapes: W_NK weight; H_KK; scale and zero `[N, K / group_size]`.
Differs from the paper: the range that it begins with is from min to max, shrunken by a fixed `shrink` (0.9 to 1 in the
paper, by width); rows may have groups, whose scales are then fitted together; a scale is kept when rounding it to its
stored type spoils it. The authors' code leaves the update of the scale out; the paper's text has it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.rounding.descent_core import gradient, refit_scales
from hf_quant.plugins.rounding.gptq import living
from hf_quant.qtensor import QTensor, as_blocks, expand, from_extremes, nearest
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import LayerMse, Quadratic
from hf_quant.stages.range import Range
from hf_quant.stages.solver import Nearest


@dataclass(frozen=True, slots=True)
class ShrunkenExtremes:
    """Min to max, times a factor."""

    shrink: float = 0.95

    def fit(self, W_NK: Tensor, spec: Spec, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Range.fit`."""
        blocks = as_blocks(W_NK, spec)
        return from_extremes(blocks.amin(-1) * self.shrink, blocks.amax(-1) * self.shrink, spec)


@dataclass(frozen=True, slots=True)
class GreedyDescent:
    """`sweeps` over the weights of every row, each in the row's own order, and over the scales.

    Attributes:
        sweeps: how many.
        greedy: by falling `|x_j| |w_rj|`; False: from left to right.
    """

    sweeps: int = 4
    greedy: bool = True

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ConfigError(f"sweeps={self.sweeps!r}: at least 1")

    def refuses(self, spec: Spec) -> str | None:
        """Takes scalar grids whose blocks are one row high."""
        if spec.grid.vector != 1:
            return "COMQ takes scalar grids only"
        return None if spec.block[0] == 1 else "every row is solved for itself: a block must be one row high"

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """See `Solver.solve`."""
        if quadratic is None or not bool(quadratic.H_KK.diagonal().any()):
            return Nearest().solve(W_NK, spec, fit, None)
        W_NK, quadratic = living(W_NK, quadratic)
        q = nearest(W_NK, *fit.fit(W_NK, spec, quadratic.H_KK.diagonal()), spec)
        order_NK = torch.arange(q.shape[1], device=W_NK.device).expand(q.shape)
        if self.greedy:
            order_NK = (W_NK.abs() * quadratic.H_KK.diagonal().sqrt()).argsort(dim=1, descending=True, stable=True)
        for _ in range(self.sweeps):
            codes = sweep_rows(W_NK, q, quadratic, order_NK)
            q = refit_scales(W_NK, QTensor(codes, q.scale, q.zero, spec, q.shape), quadratic)
        return q


def sweep_rows(W_NK: Tensor, q: QTensor, quadratic: Quadratic, order_NK: Tensor) -> Tensor:
    """Codes after one step in each coordinate, every row in its own order."""
    H_KK, grid, pivots = quadratic.H_KK, q.spec.grid, quadratic.H_KK.diagonal()
    scale = expand(q.scale, q.spec, q.shape).expand(q.shape)
    zero = torch.zeros_like(scale) if q.zero is None else expand(q.zero, q.spec, q.shape).expand(q.shape)
    codes, Q_NK, row = q.codes.clone(), q.dequantize(), torch.arange(q.shape[0], device=W_NK.device)
    G_NK = gradient(W_NK, Q_NK, quadratic)
    for j in order_NK.T:
        s, z, value = scale[row, j], zero[row, j], Q_NK[row, j]
        codes[row, j] = code = grid.encode((value + G_NK[row, j] / pivots[j]) / s + z)
        Q_NK[row, j] = new = (grid.decode(code) - z) * s
        G_NK -= H_KK[j] * (new - value)[:, None]
    return codes


@method(
    "comq",
    paper=Paper("2403.07134", "COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="the layer error falls at every step; KL at most 0.7 of rtn's at 4 bits, a row a scale",
)
def comq(
    bits: int = 4,
    group_size: int = -1,
    symmetric: bool = False,
    shrink: float = 0.95,
    sweeps: int = 4,
    greedy: bool = True,
) -> Recipe:
    """LayerMse solved by greedy coordinate descent over weights and scales."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=ShrunkenExtremes(shrink),
        objective=LayerMse(),
        solver=GreedyDescent(sweeps, greedy),
    )
