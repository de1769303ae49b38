"""GPTAQ: efficient finetuning-free quantization with asymmetric calibration (arXiv:2504.02692).

GPTQ aimed at the output that the full-precision path has, `||W X~ - Q X||^2`, where X are the inputs on the quantized
path and X~ those of the same tokens in full precision. With `D = (2/N) (X~ - X) X^T`, in the loop of GPTQ:

    P = alpha * striu(D U^T) U;   W[:, i+1:] -= e (x) U[i, i+1:] - w_i (x) P[i, i+1:]

Shapes: W_NK weight; H_KK and D_KK; U_KK and P_KK upper and strictly upper.
Differs from the paper: alpha = 0.25 as in the authors' code (the derivation has 1); both streams are captured in one
pass per group of sites, so X~ is that of each sub-module. Experts and
layers outside every block are refused: a router may send an expert other tokens than in full precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.coherent_clip import CoherentClip
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.plugins.rounding.gptq_core import Term, carry
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec
from hf_quant.stages.objective import AsymmetricMse, Quadratic


@dataclass(frozen=True, slots=True)
class Drift:
    """The part of the inputs' drift that the columns behind can make up for."""

    alpha: float = 0.25

    def terms(self, quadratic: Quadratic, U_KK: Tensor) -> Iterator[Term]:
        """P, driven by the latent column."""
        if quadratic.D_KK is not None:
            yield Term(self.alpha * carry(quadratic.D_KK, U_KK), lambda column: column.latent)


@method(
    "gptaq",
    paper=Paper("2504.02692", "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration"),
    domains={"llm", "vit", "mamba", "diffusion"},
    claim="equals gptq when both paths agree; KL to full precision below rtn's at 3 bits in groups of 64",
)
def gptaq(
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    damp: float = 0.01,
    act_order: bool = False,
    clip_steps: int = 24,
    alpha: float = 0.25,
    coherent: float = 0.0,
) -> Recipe:
    """AsymmetricMse solved by Gptq with its drift term."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=CoherentClip(steps=clip_steps, coherent=coherent),
        objective=AsymmetricMse(),
        solver=Gptq(damp=damp, act_order=act_order, corrections=(Drift(alpha),)),
    )
