"""QERA: the low-rank term with the least output error, in closed form (arXiv:2410.06040).

Minimizes `E ||(W - Q - up down) x||^2`; with `R = E[x x^T]` that is `||(W - Q - up down) R^(1/2)||_F`:

    exact:   up down = SVD_R((W - Q) R^(1/2)) R^(-1/2)
    approx:  R taken as diagonal, `S = diag(sqrt(E[x_k^2]))`

Shapes: W_NK weight; R `[K, K]`; down_RK, up_NR.
Differs from the paper: the root is that of the damped matrix (1e-6 of its mean diagonal), because calibration sees
fewer directions than inputs; integers in groups instead of MXINT; any quantizer that is a recipe can come before it.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_quant.method import Paper, method
from hf_quant.plugins.residual.lorc import LowRankRepair
from hf_quant.plugins.residual.lowrank_core import symmetric_root
from hf_quant.recipe import Recipe
from hf_quant.runtime.branches import AdapterBits
from hf_quant.spec import int_spec
from hf_quant.stats import Gram, Moments, Stat, Stats, hessian


@dataclass(frozen=True, slots=True)
class RootMeanSquare:
    """Inputs by their energy, as if they were uncorrelated."""

    needs: ClassVar[tuple[Stat, ...]] = (Moments(),)

    def matrix(self, stats: Stats) -> Tensor:
        """`[K]`; a channel that was never seen counts a thousandth of the mean."""
        root: Tensor = (stats[Moments()]["square"] / stats[Moments()]["count"].clamp_min(1)).sqrt()
        return root.clamp_min(1e-3 * root.mean().clamp_min(1e-12))


@dataclass(frozen=True, slots=True)
class Autocorrelation:
    """Inputs with their correlations."""

    damp: float = 1e-6
    needs: ClassVar[tuple[Stat, ...]] = (Gram(),)

    def matrix(self, stats: Stats) -> Tensor:
        """`[K, K]`."""
        return symmetric_root(hessian(stats), self.damp)


@method(
    "qera",
    paper=Paper("2410.06040", "QERA: an Analytical Framework for Quantization Error Reconstruction"),
    domains={"llm", "vit", "vlm", "moe", "diffusion"},
    claim="output error exact <= approximate <= plain SVD in every layer; KL at most lqer's at 3 bits",
)
def qera(
    bits: int = 4, group_size: int = 128, rank: int = 16, exact: bool = True, adapter_bits: AdapterBits = 16
) -> Recipe:
    """Rounding to nearest, and the branch with the least output error (`exact=False`: inputs taken as uncorrelated).

    The branch is stored in 16, 8 or 4 bits.
    """
    weighting = Autocorrelation() if exact else RootMeanSquare()
    return Recipe(weights=int_spec(bits, group_size), repairs=(LowRankRepair(rank, weighting, adapter_bits),))
