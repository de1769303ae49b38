"""LQER: low-rank error reconstruction scaled by the activations (arXiv:2402.02446, there L2QER).

    S = diag(a),  a_k = mean |x_k|;  up down = SVD_R(E S) S^-1,  E = W - Q

Shapes: W_NK weight; down_RK, up_NR; a `[K]`.
Differs from the paper: weights are integers in groups; the branch is in the model's own type, or integers in groups
with `adapter_bits=8`, where the paper has 8-bit MXINT blocks.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_quant.method import Paper, method
from hf_quant.plugins.residual.lorc import LowRankRepair
from hf_quant.recipe import Recipe
from hf_quant.runtime.branches import AdapterBits
from hf_quant.spec import int_spec
from hf_quant.stats import Moments, Stat, Stats


@dataclass(frozen=True, slots=True)
class MeanAbs:
    """Inputs by their mean magnitude."""

    needs: ClassVar[tuple[Stat, ...]] = (Moments(),)

    def matrix(self, stats: Stats) -> Tensor:
        """`[K]`; a channel that was never seen counts a thousandth of the mean."""
        mean: Tensor = stats[Moments()]["abs"] / stats[Moments()]["count"].clamp_min(1)
        return mean.clamp_min(1e-3 * mean.mean().clamp_min(1e-12))


@method(
    "lqer",
    paper=Paper("2402.02446", "LQER: Low-Rank Quantization Error Reconstruction for LLMs"),
    domains={"llm", "vit", "vlm", "moe", "diffusion"},
    claim="KL at most lorc's at 3 bits and the same rank, with outliers among the activations",
)
def lqer(bits: int = 4, group_size: int = 128, rank: int = 16, adapter_bits: AdapterBits = 16) -> Recipe:
    """Rounding to nearest, and a branch weighted by mean magnitudes (stored in 16, 8 or 4 bits)."""
    return Recipe(weights=int_spec(bits, group_size), repairs=(LowRankRepair(rank, MeanAbs(), adapter_bits),))
