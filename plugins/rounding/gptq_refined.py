"""GPTQ refined: its solution, improved by coordinate descent and refitted scales (arXiv:2210.17323, arXiv:2309.01885).

GPTQ decides each column once, knowing nothing of the roundings behind it, and a group's scale before its codes. Both
are cheap to mend, because the error is a quadratic form whose every step can be weighed exactly:

    codes:   q_j <- nearest level to  q_j + [ (W - Q) H + W D ]_j / H_jj        column after column, `sweeps` times
    scales:  s_r <- argmin tr(E H E^T) + 2 tr(W D E^T)  over the scales of row r, all its groups together

and so on, `rounds` times; no step makes a layer's error larger. The target is the output that the full-precision path
has (arXiv:2504.02692), all of it: the descent needs no approximation to follow the drift D of the inputs.

Shapes: W_NK weight; H_KK and D_KK; scale and zero `[N, K / group_size]`.
Differs from the paper: there is none; it is GPTQ in the order of falling `H_ii` with ranges fixed beforehand, the
descent of QuantEase without its relaxed sweeps, and COMQ's scales for groups; the descent is damped as GPTQ is.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.coherent_clip import CoherentClip
from hf_quant.plugins.rounding.descent_core import descend, refit_scales
from hf_quant.plugins.rounding.gptaq import Drift
from hf_quant.plugins.rounding.gptq import Gptq, living
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import AsymmetricMse, Quadratic
from hf_quant.stages.range import Range
from hf_quant.stages.solver import Solver


@dataclass(frozen=True, slots=True)
class Refined:
    """What `start` finds, then `rounds` of at most `sweeps` over the codes and a fit of the scales; codes come last."""

    start: Solver = Gptq(act_order=True, corrections=(Drift(1.0),))
    rounds: int = 2
    sweeps: int = 4
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.sweeps < 1:
            raise ConfigError(f"rounds={self.rounds!r}, sweeps={self.sweeps!r}: at least 0 rounds and 1 sweep")

    def refuses(self, spec: Spec) -> str | None:
        """Takes what the first solver takes."""
        return self.start.refuses(spec)

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """See `Solver.solve`."""
        q = self.start.solve(W_NK, spec, fit, quadratic)
        if quadratic is None or not bool(quadratic.H_KK.diagonal().any()):
            return q
        W_NK, quadratic = damped(*living(W_NK, quadratic), self.damp)
        for _ in range(self.rounds):
            q = refit_scales(W_NK, descend(W_NK, q, quadratic, self.sweeps), quadratic)
        return descend(W_NK, q, quadratic, self.sweeps)


def damped(W_NK: Tensor, quadratic: Quadratic, damp: float) -> tuple[Tensor, Quadratic]:
    """H with `damp` of its mean diagonal added: with few samples the least error on them is not the least error."""
    H = quadratic.H_KK
    return W_NK, replace(quadratic, H_KK=H + damp * H.diagonal().mean() * torch.eye(len(H), device=H.device))


@method(
    "gptq-refined",
    paper=Paper("2210.17323", "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="no layer's output error above gptq's; KL at most 0.98 of gptq's at 3 bits in groups of 64",
)
def gptq_refined(
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    damp: float = 0.01,
    clip_steps: int = 24,
    rounds: int = 2,
    sweeps: int = 4,
    share: float = 1.0,
    coherent: float = 0.0,
) -> Recipe:
    """AsymmetricMse solved by Gptq and refined (`share` of the drift is followed)."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=CoherentClip(steps=clip_steps, coherent=coherent),
        objective=AsymmetricMse(share),
        solver=Refined(Gptq(damp=damp, act_order=True, corrections=(Drift(1.0),)), rounds, sweeps, damp),
    )
