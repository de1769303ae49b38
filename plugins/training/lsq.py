"""LSQ: quantization-aware training of weights and step sizes (arXiv:1902.08153).

    Q = s (clamp(round(W / s + z), low, high) - z);  dQ/dW = 1 inside the range;  the gradient of s is scaled by
    1 / sqrt(values in a block * high)

Shapes: W_NK weight; s `[N, G]`.
Differs from the paper: begins at a solver's codes instead of `2 mean|W| / sqrt(high)`; zero points are kept; weights
are learned in units of the solver's step and step sizes relative to it, each with a learning rate of its own; of what
is not rounded only gains of norms are learned; distilled from the full-precision model; no activations are rounded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.coherent_clip import CoherentClip
from hf_quant.plugins.rounding.gptq_refined import Refined
from hf_quant.plugins.training.fake_core import keep_positive, near_codes, ratio_rate, scaled_gradient
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
    values_of,
)
from hf_quant.stages.objective import AsymmetricMse
from hf_quant.stages.sampler import TextSampler
from hf_quant.stages.trainer import Qat


class LsqFake(FakeQuant):
    """Weights and step sizes are learned."""

    def __init__(self, W_NK: Tensor, q: QTensor, how: "Lsq") -> None:
        super().__init__()
        self.q, self.how = q, how
        zero = 0 if q.zero is None else expand(q.zero, q.spec, q.shape)
        self.weight = nn.Parameter(near_codes(W_NK, q) - zero)  # in steps of the solver's
        self.ratio = nn.Parameter(torch.ones_like(q.scale))  # of step sizes, to the solver's

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Grid units before rounding, and step sizes as they are stored."""
        spec, (_, high) = self.q.spec, bounds(self.q.spec)
        count = self.weight.numel() / self.ratio.numel()
        scale = stored(scaled_gradient(self.ratio, (count * max(1, high)) ** -0.5) * self.q.scale, spec)
        steps = self.weight * expand(self.q.scale / scale, spec, self.q.shape)
        return steps if self.q.zero is None else steps + expand(self.q.zero, spec, self.q.shape), scale

    def forward(self, W_NK: Tensor) -> Tensor:
        """See the module; the argument is the weight as it was."""
        steps, scale = self._parts()
        return values_of(self.how.estimator.round(steps, *bounds(self.q.spec)), scale, self.q)

    @torch.no_grad()
    def export(self, W_NK: Tensor) -> QTensor:
        """The codes of `forward`."""
        steps, scale = self._parts()
        return QTensor(self.q.spec.grid.encode(steps), scale, self.q.zero, self.q.spec, self.q.shape)

    def learned(self) -> list[Learned]:
        """Weights and step sizes."""
        return [(self.weight, self.how.lr), (self.ratio, ratio_rate(self.how.lr_scale, self.q.spec))]

    def after_step(self) -> None:
        """A step size stays positive."""
        keep_positive(self.ratio)


@dataclass(frozen=True, slots=True)
class Lsq:
    """Learned weights and step sizes."""

    lr: float = 1e-3
    lr_scale: float = 8e-3
    estimator: Estimator = Clipped()

    def refuses(self, spec: Spec) -> str | None:
        """Integer grids."""
        return refuses_grid(spec)

    def start(self, W_NK: Tensor, q: QTensor, generator: torch.Generator) -> FakeQuant:
        """At the solver's codes."""
        return LsqFake(W_NK, q, self)


@method(
    "lsq",
    paper=Paper("1902.08153", "Learned Step Size Quantization"),
    domains={"llm"},
    claim="at 2 bits a few hundred steps leave less than half of the KL of rounding to the same ranges",
)
def lsq(
    bits: int = 4,
    group_size: int = 128,
    steps: int = 200,
    batch_size: int = 8,
    lr: float = 1e-3,
    lr_scale: float = 8e-3,
    lr_norms: float = 2e-3,
    distill: float = 1.0,
    samples: int = 512,
    length: int = 512,
    gradient_checkpointing: bool = False,
) -> Recipe:
    """gptq-refined, then training of everything.

    `lr` is of weights in steps of the grid, `lr_scale` of the ends of the grid, by step sizes, in steps;
    `lr_norms` of the gains of norms, as a share of their size (0: they are not trained).
    """
    return Recipe(
        weights=int_spec(bits, group_size),
        range=CoherentClip(),
        objective=AsymmetricMse(),
        solver=Refined(),
        sampler=TextSampler(samples, length),
        trainer=Qat(
            Lsq(lr, lr_scale),
            steps=steps,
            batch_size=batch_size,
            distill=distill,
            lr_norms=lr_norms,
            gradient_checkpointing=gradient_checkpointing,
        ),
    )
