"""LoRC: a low-rank branch for the rounding error, from ZeroQuant-V2 (arXiv:2303.08302).

    E = W - Q;  E ~ U_R s_R V_R^T;  y = Q x + up (down x),  up = U_R s_R^(1/2),  down = s_R^(1/2) V_R^T

Shapes: W_NK weight; down_RK, up_NR.
Differs from the paper: the branch is in the model's own type unless `adapter_bits=8` asks for the paper's 8 bits.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.residual.lowrank_core import low_rank
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.runtime.branches import AdapterBits, Branch, LowRank, check_adapter_bits, stored_in
from hf_quant.spec import int_spec
from hf_quant.stats import Stat, Stats


class Weighting(Protocol):
    """What the error of each input channel counts: the S of `||(E - U D) S||_F`."""

    @property
    def needs(self) -> tuple[Stat, ...]:
        """The statistics it reads."""

    def matrix(self, stats: Stats) -> Tensor | None:
        """`[K]`, `[K, K]`, or None for the identity."""


@dataclass(frozen=True, slots=True)
class Plain:
    """All inputs alike."""

    needs: ClassVar[tuple[Stat, ...]] = ()

    def matrix(self, stats: Stats) -> Tensor | None:
        """The identity."""
        return None


@dataclass(frozen=True, slots=True)
class LowRankRepair:
    """A branch of `rank` nearest to the rounding error under a weighting of the inputs."""

    rank: int = 16
    weighting: Weighting = field(default_factory=Plain)
    bits: AdapterBits = 16

    def __post_init__(self) -> None:
        check_adapter_bits(self.bits)
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"rank={self.rank!r}: a positive integer; a matrix takes at most min(outputs, inputs)")

    @property
    def needs(self) -> tuple[Stat, ...]:
        """Those of the weighting."""
        return self.weighting.needs

    def repair(self, W_NK: Tensor, q: QTensor, stats: Stats) -> tuple[Branch, ...]:
        """See `Repair.repair`; a layer whose inputs nobody saw is weighted plainly."""
        S = self.weighting.matrix(stats) if stats else None
        return (stored_in(LowRank(*low_rank(W_NK.float() - q.dequantize(), self.rank, S)), self.bits),)


@method(
    "lorc",
    paper=Paper("2303.08302", "ZeroQuant-V2: Exploring Post-training Quantization in LLMs, Low Rank Compensation"),
    domains={"llm", "vit", "vlm", "moe", "diffusion"},
    claim="the branch takes the largest singular values out of the weight error; KL below rtn's at 3 bits",
)
def lorc(bits: int = 4, group_size: int = 128, rank: int = 16, adapter_bits: AdapterBits = 16) -> Recipe:
    """Rounding to nearest, and a branch (stored in 16, 8 or 4 bits)."""
    return Recipe(weights=int_spec(bits, group_size), repairs=(LowRankRepair(rank, bits=adapter_bits),))
