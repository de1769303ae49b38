"""L4Q: LoRA inside the rounding, with learned scales and zero points (arXiv:2402.04902).

    Q = s (clamp(round((W + (alpha / r) B A) / s + z)) - z);  A, B, s and z are learned, nothing else is left

Shapes: W_NK weight; A `[r, K]`, B `[N, r]`; s, z `[N, G]`.
Differs from the paper: begins at a solver's codes; zero points are rounded to integers, as they are stored, with the
straight-through gradient; BA is learned in units of the mean step and s relative to the solver's, so that learning
rates mean the same for every model; gains of norms are learned too; distilled from the full-precision model; the
gradient of the merged weight is not recomputed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.coherent_clip import CoherentClip
from hf_quant.plugins.rounding.gptq_refined import Refined
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
    exactly,
    refuses_grid,
    stored,
)
from hf_quant.stages.objective import AsymmetricMse
from hf_quant.stages.sampler import TextSampler
from hf_quant.stages.trainer import Qat


class L4qFake(FakeQuant):
    """A low-rank term on the weight, step sizes and zero points."""

    def __init__(self, W_NK: Tensor, q: QTensor, how: "L4q", generator: torch.Generator) -> None:
        super().__init__()
        self.q, self.how = q, how
        zero = 0 if q.zero is None else expand(q.zero, q.spec, q.shape)
        self.register_buffer("frozen", (near_codes(W_NK, q) - zero) * expand(q.scale, q.spec, q.shape))
        self.term = LowRankTerm(q.shape, how.rank, how.alpha, generator)
        self.register_buffer("unit", q.scale.mean())
        self.ratio = nn.Parameter(torch.ones_like(q.scale))  # to the solver's: one rate for models of any size
        self.zero = None if q.zero is None else nn.Parameter(q.zero.clone())

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Grid units before rounding; scale and zero as stored."""
        spec, (low, high) = self.q.spec, bounds(self.q.spec)
        scale = stored(self.ratio * self.q.scale, spec)
        weight = self.frozen + self.unit * self.term()
        steps = weight / expand(scale, spec, self.q.shape)
        if self.zero is None:
            return steps, scale, None
        near = self.zero.detach().round().clamp(low, high)
        zero = exactly(self.zero, near)
        return steps + expand(zero, spec, self.q.shape), scale, zero

    def forward(self, W_NK: Tensor) -> Tensor:
        """See the module; the weight as it was is in the frozen part."""
        spec = self.q.spec
        steps, scale, zero = self._parts()
        codes = self.how.estimator.round(steps, *bounds(spec))
        if zero is not None:
            codes = codes - expand(zero, spec, self.q.shape)
        return codes * expand(scale, spec, self.q.shape)

    @torch.no_grad()
    def export(self, W_NK: Tensor) -> QTensor:
        """The codes of `forward`."""
        steps, scale, zero = self._parts()
        return QTensor(self.q.spec.grid.encode(steps), scale, zero, self.q.spec, self.q.shape)

    def learned(self) -> list[Learned]:
        """A, B, step sizes and zero points."""
        rates: list[Learned] = [
            (self.term.A, self.how.lr),
            (self.term.B, self.how.lr),
            (self.ratio, ratio_rate(self.how.lr_scale, self.q.spec)),
        ]
        return rates if self.zero is None else [*rates, (self.zero, self.how.lr_zero)]

    def after_step(self) -> None:
        """A step size stays positive."""
        keep_positive(self.ratio)


@dataclass(frozen=True, slots=True)
class L4q:
    """LoRA inside the rounding, learned scales and zero points."""

    rank: int = 16
    alpha: float = 16.0
    lr: float = 2e-3
    lr_scale: float = 8e-3
    lr_zero: float = 2e-3
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
        return L4qFake(W_NK, q, self, generator)


@method(
    "l4q",
    paper=Paper("2402.04902", "L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models"),
    domains={"llm"},
    claim="integers alone in the end; at 3 bits KL below that of an adapter merged and rounded afterwards",
)
def l4q(
    bits: int = 4,
    group_size: int = 128,
    rank: int = 16,
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
    """gptq-refined, then training of LoRA, scales and zero points inside the rounding.

    `lr` is of LoRA in steps of the grid, `lr_scale` of the ends of the grid, by step sizes, in steps;
    `lr_norms` of the gains of norms, as a share of their size (0: they are not trained).
    """
    return Recipe(
        weights=int_spec(bits, group_size),
        range=CoherentClip(),
        objective=AsymmetricMse(),
        solver=Refined(),
        sampler=TextSampler(samples, length),
        trainer=Qat(
            L4q(rank, float(rank), lr, lr_scale),
            steps=steps,
            batch_size=batch_size,
            distill=distill,
            lr_norms=lr_norms,
            gradient_checkpointing=gradient_checkpointing,
        ),
    )
