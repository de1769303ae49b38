"""LR-QAT: low-rank quantization-aware training (arXiv:2406.06385).

    Q = s (clamp(round(P + (alpha / r) B A + z)) - z),  P = W / s_0 frozen;  s, A and B are learned

The low-rank term lies inside the rounding, in units of the grid: it moves codes, and nothing of it is left afterwards.

Shapes: W_NK weight; A `[r, K]`, B `[N, r]`; s `[N, G]`.
Differs from the paper: P begins near the solver's code, so any solver can come before, and each block is first fitted
by itself to its full-precision output, which tells of far more codes where they belong than the model's answer does; P
is kept in bfloat16 or float32 (the paper also has 8-bit fixed point); step sizes are learned relative to the solver's,
so that a learning rate means the same for every model; gains of norms are learned too; distilled from the
full-precision model.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.coherent_clip import CoherentClip
from hf_quant.plugins.rounding.gptq_refined import Refined
from hf_quant.plugins.rounding.lsq_ptq import Places
from hf_quant.plugins.training.fake_core import (
    LowRankTerm,
    check_rank,
    keep_positive,
    near_codes,
    ratio_rate,
    refuses_rank,
)
from hf_quant.qtensor import QTensor, expand
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.fakequant import (
    Clipped,
    Estimator,
    FakeQuant,
    Learned,
    bounds,
    refuses_grid,
    stored,
)
from hf_quant.stages.objective import AsymmetricMse
from hf_quant.stages.reconstruction import Reconstruction
from hf_quant.stages.sampler import TextSampler
from hf_quant.stages.trainer import Qat

REACH = 0.45  # of a place on the grid while its block is fitted by itself, in steps: further, noise moves codes


class LrQatFake(FakeQuant):
    """A low-rank term in units of the grid, and step sizes."""

    def __init__(self, W_NK: Tensor, q: QTensor, how: "LrQat", generator: torch.Generator) -> None:
        super().__init__()
        self.q, self.how = q, how
        start = near_codes(W_NK, q)
        if how.frozen == "bfloat16":  # may leave the cell of a code above 127: half a step is then below its precision
            values = q.spec.grid.decode(q.codes)
            start = (start - values).to(torch.bfloat16)
        self.register_buffer("frozen", start)
        self.term = LowRankTerm(q.shape, how.rank, how.alpha, generator)
        self.ratio = nn.Parameter(torch.ones_like(q.scale))  # to the solver's: one rate for models of any size

    def _steps(self) -> Tensor:
        """`P + (alpha / r) B A + z`, float32."""
        frozen: Tensor = self.frozen  # type: ignore[assignment]
        base = frozen if frozen.dtype == torch.float32 else self.q.spec.grid.decode(self.q.codes) + frozen.float()
        steps: Tensor = base + self.term()
        return steps

    def forward(self, W_NK: Tensor) -> Tensor:
        """See the module; the weight as it was is in the frozen part."""
        spec = self.q.spec
        codes = self.how.estimator.round(self._steps(), *bounds(spec))
        if self.q.zero is not None:
            codes = codes - expand(self.q.zero, spec, self.q.shape)
        return codes * expand(self._scale(), spec, self.q.shape)

    def export(self, W_NK: Tensor) -> QTensor:
        """The codes of `forward`."""
        spec = self.q.spec
        codes = spec.grid.encode(self._steps().detach())
        return QTensor(codes, self._scale().detach(), self.q.zero, spec, self.q.shape)

    def _scale(self) -> Tensor:
        return stored(self.ratio * self.q.scale, self.q.spec)

    def learned(self) -> list[Learned]:
        """A, B and step sizes."""
        return [
            (self.term.A, self.how.lr),
            (self.term.B, self.how.lr),
            (self.ratio, ratio_rate(self.how.lr_scale, self.q.spec)),
        ]

    def after_step(self) -> None:
        """A step size stays positive."""
        keep_positive(self.ratio)


@dataclass(frozen=True, slots=True)
class LrQat:
    """Low-rank terms in units of the grid."""

    rank: int = 32
    alpha: float = 32.0
    lr: float = 2e-3
    lr_scale: float = 8e-3
    frozen: Literal["float32", "bfloat16"] = "bfloat16"
    estimator: Estimator = Clipped()

    def __post_init__(self) -> None:
        check_rank(self.rank)

    def refuses(self, spec: Spec) -> str | None:
        """Integer grids."""
        return refuses_grid(spec)

    def refuses_matrix(self, shape: tuple[int, int], spec: Spec) -> str | None:
        """Too high a rank."""
        return refuses_rank(self.rank, shape)

    def start(self, W_NK: Tensor, q: QTensor, generator: torch.Generator) -> FakeQuant:
        """At the solver's codes."""
        return LrQatFake(W_NK, q, self, generator)


@method(
    "lr-qat",
    paper=Paper("2406.06385", "Low-Rank Quantization-Aware Training for LLMs"),
    domains={"llm"},
    claim="KL below that of gptq-refined, where it begins, at 2 bits; optimizer state a fraction of full training's",
)
def lr_qat(
    bits: int = 4,
    group_size: int = 128,
    rank: int = 32,
    block_steps: int = 150,
    steps: int = 200,
    batch_size: int = 8,
    lr: float = 2e-3,
    lr_scale: float = 8e-3,
    lr_norms: float = 2e-3,
    distill: float = 1.0,
    samples: int = 512,
    length: int = 512,
    gradient_checkpointing: bool = False,
) -> Recipe:
    """gptq-refined, `block_steps` on each block alone, then training of low-rank terms inside the rounding.

    `lr` is of those terms in steps of the grid, `lr_scale` of the ends of the grid, by step sizes, in steps;
    `lr_norms` of the gains of norms, as a share of their size (0: they are not trained).
    """
    return Recipe(
        weights=int_spec(bits, group_size),
        range=CoherentClip(),
        objective=AsymmetricMse(),
        solver=Refined(),
        sampler=TextSampler(samples, length, batch_size),
        tuner=Reconstruction(Places(lr=REACH / block_steps), steps=block_steps) if block_steps else None,
        trainer=Qat(
            LrQat(rank, float(rank), lr, lr_scale),
            steps=steps,
            batch_size=batch_size,
            distill=distill,
            lr_norms=lr_norms,
            gradient_checkpointing=gradient_checkpointing,
        ),
    )
