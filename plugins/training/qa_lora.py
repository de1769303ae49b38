"""QA-LoRA: adapters that pool their inputs over groups, and so merge into zero points exactly (arXiv:2309.14717).

    y = Q x + (alpha / r) B A P x,  P the sum over each group of inputs;  merged:  z -> z - (alpha / r) (B A) / s

Shapes: W_NK weight; A `[r, G]`, B `[N, r]`; s, z `[N, G]`.
Differs from the paper: P sums instead of averaging (a factor of the learning rate); zero points are float32, which is
why merging is exact to the bit; distilled from the full-precision model. PEFT's own `use_qalora=True` trains such
adapters on models of this method (or of any), and `hf_quant.merge_adapter` merges them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.grids import IntGrid
from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.plugins.training.fake_core import LowRankTerm, check_rank, refuses_rank
from hf_quant.qtensor import QTensor, expand
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, check_group_size
from hf_quant.stages.fakequant import FakeQuant, Learned
from hf_quant.stages.objective import LayerMse
from hf_quant.stages.sampler import TextSampler
from hf_quant.stages.trainer import Qat


class QaLoraFake(FakeQuant):
    """Frozen codes and scales; zero points move by a low-rank term."""

    def __init__(self, q: QTensor, how: "QaLora", generator: torch.Generator) -> None:
        super().__init__()
        assert q.zero is not None  # noqa: S101  `refuses` has seen to it
        self.q, self.how, self.start = q, how, q.zero
        self.term = LowRankTerm((q.zero.shape[0], q.zero.shape[1]), how.rank, how.alpha, generator)

    def _zero(self) -> Tensor:
        zero: Tensor = self.start - self.term() / self.q.scale
        return zero

    def forward(self, W_NK: Tensor) -> Tensor:
        """Codes with moved zero points."""
        values = self.q.spec.grid.decode(self.q.codes) - expand(self._zero(), self.q.spec, self.q.shape)
        return values * expand(self.q.scale, self.q.spec, self.q.shape)

    @torch.no_grad()
    def export(self, W_NK: Tensor) -> QTensor:
        """The same codes and scales."""
        return QTensor(self.q.codes, self.q.scale, self._zero(), self.q.spec, self.q.shape)

    def learned(self) -> list[Learned]:
        """A and B."""
        return [(self.term.A, self.how.lr), (self.term.B, self.how.lr)]


@dataclass(frozen=True, slots=True)
class QaLora:
    """Adapters that pool their inputs over the groups of the codes."""

    rank: int = 8
    alpha: float = 16.0
    lr: float = 1e-4

    def __post_init__(self) -> None:
        check_rank(self.rank)

    def refuses(self, spec: Spec) -> str | None:
        """Takes float zero points and nothing else."""
        return None if spec.zero == "float" else "a pooled adapter merges into float zero points, which the spec lacks"

    def refuses_matrix(self, shape: tuple[int, int], spec: Spec) -> str | None:
        """Too high a rank for a value a group."""
        return refuses_rank(self.rank, spec.blocks(shape), "matrix of groups")

    def start(self, W_NK: Tensor, q: QTensor, generator: torch.Generator) -> FakeQuant:
        """The term is zero."""
        return QaLoraFake(q, self, generator)


@method(
    "qa-lora",
    paper=Paper("2309.14717", "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models"),
    domains={"llm"},
    claim="merging is exact: codes and scales are those of before; KL below that of the model it began with at 3 bits",
)
def qa_lora(
    bits: int = 4,
    group_size: int = 32,
    rank: int = 8,
    steps: int = 200,
    batch_size: int = 8,
    lr: float = 1e-4,
    distill: float = 1.0,
    samples: int = 512,
    length: int = 512,
    gradient_checkpointing: bool = False,
) -> Recipe:
    """GPTQ with float zero points, then training of those by low-rank terms."""
    check_group_size(group_size)
    return Recipe(
        weights=Spec(grid=IntGrid(bits), block=(1, group_size), zero="float"),
        range=MseClip(steps=24, floor=0.5, power=2.0),
        objective=LayerMse(),
        solver=Gptq(),
        sampler=TextSampler(samples, length),
        trainer=Qat(
            QaLora(rank, 2.0 * rank, lr),
            steps=steps,
            batch_size=batch_size,
            distill=distill,
            gradient_checkpointing=gradient_checkpointing,
        ),
    )
