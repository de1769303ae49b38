"""ResComp: rethinking residual errors in compensation-based LLM quantization (arXiv:2604.07955).

GPTQ and GPTAQ make up for errors around the *compensated* weights; here the aim is the output `W0 X~` of the original
ones. With `D = (2/N) (X~ - X) X^T`, `C = (2/N) X~ X^T = D + H`, in the loop of GPTQ:

    P = alpha striu(D U^T) U,  R = alpha_2 striu(C U^T) U
    W[:, i+1:] -= e (x) U[i, i+1:] - w_i (x) P[i, i+1:] - (w0_i - w_i) (x) R[i, i+1:]

Shapes: W_NK weight; H_KK, D_KK and C_KK; U_KK upper, P_KK and R_KK strictly upper.
Differs from the paper: the w_i of both terms is moved into the representable range (at 2 bits: rounded), as in the
authors' code but inside a lazy block too, where that code takes it as it is; both streams are captured in one pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.plugins.rounding.gptq_core import Column, Term, carry
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec
from hf_quant.stages.objective import AsymmetricMse, Quadratic


@dataclass(frozen=True, slots=True)
class Residual:
    """GPTAQ's drift and the departure from the original weights.

    Attributes:
        alpha: weight of the drift, P.
        alpha2: weight of the departure, R.
        of: what stands for the column in both: `Column.clamped`, or `Column.value`, which cannot diverge at 2 bits.
    """

    alpha: float = 0.25
    alpha2: float = 0.25
    of: Literal["latent", "clamped", "value"] = "clamped"

    def terms(self, quadratic: Quadratic, U_KK: Tensor) -> Iterator[Term]:
        """P and R; without drift the latter alone, with C = H."""

        def column(c: Column) -> Tensor:
            taken: Tensor = getattr(c, self.of)
            return taken

        C = quadratic.H_KK
        if quadratic.D_KK is not None:
            C = C + quadratic.D_KK
            yield Term(self.alpha * carry(quadratic.D_KK, U_KK), column)
        yield Term(self.alpha2 * carry(C, U_KK), lambda c: c.original - column(c))


@method(
    "rescomp",
    paper=Paper("2604.07955", "Rethinking Residual Errors in Compensation-based LLM Quantization"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="equals gptq at alpha = alpha2 = 0; KL below gptq's at 3 bits, a row a scale",
)
def rescomp(
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    damp: float = 0.01,
    act_order: bool = False,
    clip_steps: int = 24,
    alpha: float = 0.25,
    alpha2: float = 0.25,
) -> Recipe:
    """AsymmetricMse solved by Gptq with both residual errors."""
    residual = Residual(alpha, alpha2, "clamped" if bits > 2 else "value")
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        objective=AsymmetricMse(),
        solver=Gptq(damp=damp, act_order=act_order, corrections=(residual,)),
    )
