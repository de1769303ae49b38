"""QLoRA: adapters on frozen 4-bit weights (arXiv:2305.14314).

    y = Q x + (alpha / r) B (A x);  Q frozen, A and B are learned and stay beside the codes

Shapes: W_NK weight; A `[r, K]`, B `[N, r]`.
Differs from the paper: integers in groups with searched ranges instead of NF4 with doubly quantized scales (PEFT trains
adapters on a `bnb-nf4` model as on any other of ours); the adapter is a branch of the layer, saved and counted with it;
distilled from the full-precision model. `init="loftq"`: codes and the adapter's first values are those of LoftQ
(arXiv:2310.08659).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.residual.loftq import Loftq
from hf_quant.plugins.residual.lowrank_core import low_rank
from hf_quant.plugins.training.fake_core import LowRankTerm, check_rank, refuses_rank
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.runtime.branches import AdapterBits, CodedLowRank, LowRank, check_adapter_bits, stored_in
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.fakequant import FakeQuant, Learned, exactly
from hf_quant.stages.sampler import TextSampler
from hf_quant.stages.solver import Nearest
from hf_quant.stages.trainer import Qat


class QloraFake(FakeQuant):
    """Frozen codes and a low-rank term beside them."""

    def __init__(self, W_NK: Tensor, q: QTensor, how: "Qlora", generator: torch.Generator) -> None:
        super().__init__()
        self.q, self.how = q, how
        self.term = LowRankTerm(q.shape, how.rank, how.alpha, generator)
        if how.init == "loftq":
            down, up = low_rank(W_NK.float() - q.dequantize(), how.rank)
            with torch.no_grad():
                self.term.A.copy_(down)
                self.term.B.copy_(up / self.term.scaling)

    def forward(self, W_NK: Tensor) -> Tensor:
        """Codes and term, which is rounded as it will be stored, with a straight-through gradient."""
        term = self.term()
        weight: Tensor = self.q.dequantize() + (term if self.how.bits == 16 else exactly(term, self.branch().matrix()))
        return weight

    def export(self, W_NK: Tensor) -> QTensor:
        """The codes as they were."""
        return self.q

    @torch.no_grad()
    def branch(self) -> LowRank | CodedLowRank:
        """The term."""
        return stored_in(LowRank(self.term.A.detach().clone(), self.term.scaling * self.term.B.detach()), self.how.bits)

    def learned(self) -> list[Learned]:
        """A and B."""
        return [(self.term.A, self.how.lr), (self.term.B, self.how.lr)]


@dataclass(frozen=True, slots=True)
class Qlora:
    """Adapters beside frozen codes."""

    rank: int = 16
    alpha: float = 32.0
    lr: float = 1e-3
    bits: AdapterBits = 16
    init: Literal["zero", "loftq"] = "zero"

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_adapter_bits(self.bits)
        if self.init not in ("zero", "loftq"):
            raise ConfigError(f"init={self.init!r}: zero, or loftq (codes and term fitted to the weight in turns)")

    def refuses(self, spec: Spec) -> str | None:
        """Takes every grid: codes are not touched."""
        return None

    def refuses_matrix(self, shape: tuple[int, int], spec: Spec) -> str | None:
        """Too high a rank."""
        return refuses_rank(self.rank, shape)

    def start(self, W_NK: Tensor, q: QTensor, generator: torch.Generator) -> FakeQuant:
        """The term is zero, or what is nearest to the rounding error."""
        return QloraFake(W_NK, q, self, generator)


@method(
    "qlora",
    paper=Paper("2305.14314", "QLoRA: Efficient Finetuning of Quantized LLMs"),
    domains={"llm"},
    claim="codes are those of before; the adapter lowers the KL of the model it began with at 3 bits",
)
def qlora(
    bits: int = 4,
    group_size: int = 64,
    rank: int = 16,
    steps: int = 200,
    batch_size: int = 8,
    lr: float = 1e-3,
    distill: float = 1.0,
    samples: int = 512,
    length: int = 512,
    gradient_checkpointing: bool = False,
    adapter_bits: AdapterBits = 16,
    init: Literal["zero", "loftq"] = "zero",
) -> Recipe:
    """Ranges by least squares, rounding to nearest, and a trained branch (stored in 16, 8 or 4 bits)."""
    return Recipe(
        weights=int_spec(bits, group_size),
        range=MseClip(steps=24, floor=0.5, power=2.0),
        solver=Loftq(rank) if init == "loftq" else Nearest(),
        sampler=TextSampler(samples, length),
        trainer=Qat(
            Qlora(rank, 2.0 * rank, lr, adapter_bits, init),
            steps=steps,
            batch_size=batch_size,
            distill=distill,
            gradient_checkpointing=gradient_checkpointing,
        ),
    )
