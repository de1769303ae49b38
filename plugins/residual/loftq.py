"""LoftQ: codes and a low-rank term fitted in turns (arXiv:2310.08659).

    Q_1 = q(W);  L_t = SVD_R(W - Q_t);  Q_t+1 = q(W - L_t);  the layer is Q_T + L_T

Shapes: W_NK weight; L = up_NR down_RK.
Differs from the paper: integers in groups (the paper also has NF4); the turn with the least `||W - Q_t - L_t||_F` is
kept, as the error need not fall in every turn.
"""

from dataclasses import dataclass

from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.residual.lorc import LowRankRepair
from hf_quant.plugins.residual.lowrank_core import low_rank
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.runtime.branches import AdapterBits
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import Range
from hf_quant.stages.solver import Nearest


@dataclass(frozen=True, slots=True)
class Loftq:
    """Codes for which a term of `rank`, added afterwards (`LowRankRepair`), leaves the least weight error."""

    rank: int = 16
    turns: int = 5

    def __post_init__(self) -> None:
        if type(self.turns) is not int or self.turns < 1:
            raise ConfigError(f"turns={self.turns!r}: a positive integer, for example 5")

    def refuses(self, spec: Spec) -> str | None:
        """As rounding to nearest."""
        return Nearest().refuses(spec)

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """See `Solver.solve`."""
        W, best, least = W_NK.float(), None, float("inf")
        q = Nearest().solve(W, spec, fit, None)
        for turn in range(self.turns):
            rest = W - q.dequantize()
            down, up = low_rank(rest, self.rank)
            error = float((rest - up @ down).square().sum())
            if error < least:
                best, least = q, error
            if turn + 1 < self.turns:
                q = Nearest().solve(W - up @ down, spec, fit, None)
        assert best is not None  # noqa: S101  the first turn has set it; weights are finite
        return best


@method(
    "loftq",
    paper=Paper("2310.08659", "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models"),
    domains={"llm", "vit", "vlm", "moe", "diffusion"},
    claim="weight error never above that of lorc at the same rank, and below it at 2 bits",
)
def loftq(
    bits: int = 4, group_size: int = 128, rank: int = 16, turns: int = 5, adapter_bits: AdapterBits = 16
) -> Recipe:
    """Codes and branch in turns (the branch stored in 16, 8 or 4 bits)."""
    repair = LowRankRepair(rank, bits=adapter_bits)
    return Recipe(weights=int_spec(bits, group_size), solver=Loftq(rank, turns), repairs=(repair,))
