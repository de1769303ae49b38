"""GPTQ: accurate post-training quantization for generative pre-trained transformers (arXiv:2210.17323).

Minimizes `tr((W - Q) H (W - Q)^T)`, `H = (2/N) X X^T + l I`, `l = damp * mean(diag H)`, one input column at a time:

    q = Q(w_i);  e = (w_i - q) / U_ii;  W[:, i+1:] -= e (x) U[i, i+1:]        with (H + l I)^-1 = U^T U, U upper

Scale and zero of a group are fitted when its first column is reached, on the weights as compensated so far. The
error of column i costs `(w_i - q)^2 / U_ii^2` in the end, which is the importance that the range search is given.

Shapes: W_NK weight; H_KK input Gram matrix; scale and zero `[N, K / group_size]`.
Differs from the paper: ranges are searched (`clip_steps` ratios from 1 to 0.5) where the paper takes min to max
(`clip_steps=1`): on a trained model of 14M parameters in groups of 128 that lowers the KL at 4, 3 and 2 bits by 7, 16
and 25 %, and makes the solver two to three times as slow; the search may price what a layer's gain loses (`coherent=4`,
see `coherent_clip`), which lowers the KL at 2 bits by another fifth, and at 4 and 3 by 0 to 6 %; `act_order` (of the
authors' later code) fixes every group's range on the original weights first and undoes the permutation afterwards, so
that no group index is needed at run time; an input that is zero in all of the calibration gets a zero weight, but a
layer that saw no input at all is rounded to nearest; the damping grows tenfold until the Cholesky factorization
succeeds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.coherent_clip import CoherentClip
from hf_quant.plugins.rounding.gptq_core import Term, factorize, lazy_blocks, solve_columns
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import LayerMse, Quadratic
from hf_quant.stages.range import Range
from hf_quant.stages.solver import Nearest


class Correction(Protocol):
    """What a later paper adds to the loop."""

    def terms(self, quadratic: Quadratic, U_KK: Tensor) -> Iterable[Term]:
        """Its terms, columns in the order of the loop; none when the objective lacks what it needs."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """Optimal-brain rounding of one column after the other.

    Attributes:
        damp: added to the diagonal of H, relative to its mean.
        act_order: take columns by falling `H_ii`; groups keep their own columns and get their ranges beforehand.
        corrections: what is added to the loop (GPTAQ, ResComp).
        pull: how far each column goes back to its original before it is rounded (FOEM's beta).
    """

    damp: float = 0.01
    act_order: bool = False
    corrections: tuple[Correction, ...] = ()
    pull: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise ConfigError(f"damp={self.damp!r}: a number between 0 and 1, for example 0.01")

    def refuses(self, spec: Spec) -> str | None:
        """Takes scalar grids whose blocks are one row high."""
        if spec.grid.vector != 1:
            return "GPTQ takes scalar grids only"
        return None if spec.block[0] == 1 else "GPTQ solves every row for itself: a block must be one row high"

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """See `Solver.solve`."""
        if quadratic is None or not bool(quadratic.H_KK.diagonal().any()):
            return Nearest().solve(W_NK, spec, fit, None)
        N, K = W_NK.shape
        group = K if spec.block[1] == -1 else min(spec.block[1], K)
        W_NK, quadratic = living(W_NK, quadratic)
        H = quadratic.H_KK
        order = torch.arange(K, device=H.device)
        if self.act_order:
            order = H.diagonal().argsort(descending=True, stable=True)
        ordered = _ordered(quadratic, order)
        U = factorize(ordered.H_KK, self.damp)
        terms = [t for c in self.corrections for t in c.terms(ordered, U)]
        importance = U.diagonal().square().reciprocal()

        scales: list[Tensor] = []
        zeros: list[Tensor] = []
        if self.act_order:
            scale, zero = fit.fit(W_NK, spec, torch.empty_like(importance).index_copy_(0, order, importance))
            scales, zeros = list(scale.T.contiguous()), [] if zero is None else list(zero.T.contiguous())
        groups = (order // group).tolist()

        def range_of(i: int, W_KN: Tensor) -> tuple[Tensor, Tensor | None]:
            if groups[i] == len(scales):  # the first column of a group that has no range yet
                scale, zero = fit.fit(W_KN[i : i + group].T, spec, importance[i : i + group])
                scales.append(scale[:, 0].contiguous())
                if zero is not None:
                    zeros.append(zero[:, 0].contiguous())
            return scales[groups[i]], zeros[groups[i]] if zeros else None

        W_KN, blocks = W_NK.T[order].contiguous(), lazy_blocks(K, group)
        codes = solve_columns(W_KN, U, spec.grid, blocks, range_of, terms, self.pull)
        codes_NK = torch.empty_like(codes).index_copy_(0, order, codes).T.contiguous()
        return QTensor(codes_NK, torch.stack(scales, 1), torch.stack(zeros, 1) if zeros else None, spec, (N, K))


def living(W_NK: Tensor, quadratic: Quadratic) -> tuple[Tensor, Quadratic]:
    """An input that was always zero gets weights of zero, no drift, and a pivot of one; W becomes float32."""
    dead, D = quadratic.H_KK.diagonal() == 0, quadratic.D_KK
    D = None if D is None else D.masked_fill(dead | dead[:, None], 0)
    return W_NK.float().masked_fill(dead, 0), replace(quadratic, H_KK=quadratic.H_KK + dead.float().diag(), D_KK=D)


def _ordered(quadratic: Quadratic, order: Tensor) -> Quadratic:
    """The objective with its columns in the loop's order."""
    D = quadratic.D_KK
    return Quadratic(quadratic.H_KK[order][:, order], None if D is None else D[order][:, order])


@method(
    "gptq",
    paper=Paper("2210.17323", "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="KL to full precision at most 0.8 of rtn's at 3 bits in groups of 64; no layer's output error above rtn's",
)
def gptq(
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    damp: float = 0.01,
    act_order: bool = False,
    clip_steps: int = 24,
    coherent: float = 0.0,
) -> Recipe:
    """LayerMse solved by Gptq, group by group in the order of execution (`clip_steps=1`: ranges from min to max)."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=CoherentClip(steps=clip_steps, coherent=coherent),
        objective=LayerMse(),
        solver=Gptq(damp=damp, act_order=act_order),
    )
