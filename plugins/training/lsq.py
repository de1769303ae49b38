"""LSQ: quantization-aware training of weights and step sizes (arXiv:1902.08153).

    Q = s (clamp(round(W / s + z), low, high) - z);  dQ/dW = 1 inside the range;  the gradient of s is scaled by
    1 / sqrt(values in a block * high)

Shapes: W_NK weight; s `[N, G]`.
Differs from the paper: begins at a solver's codes (`latent`) instead of `2 mean|W| / sqrt(high)`; zero points are kept;
a learning rate of its own for the step sizes; distilled from the full-precision model; no activations are rounded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.training.fake_core import keep_positive, scaled_gradient
from hf_quant.qtensor import QTensor, expand
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.fakequant import (
    Clipped,
    Estimator,
    FakeQuant,
    Learned,
    bounds,
    latent,
    refuses_grid,
    stored,
    values_of,
)
from hf_quant.stages.sampler import TextSampler
from hf_quant.stages.trainer import Qat


class LsqFake(FakeQuant):
    """Weights and step sizes are learned."""

    def __init__(self, W_NK: Tensor, q: QTensor, how: "Lsq") -> None:
        super().__init__()
        self.q, self.how = q, how
        self.weight = nn.Parameter(values_of(latent(W_NK, q), q.scale, q))
        self.scale = nn.Parameter(q.scale.clone())

    def forward(self, W_NK: Tensor) -> Tensor:
        """See the module; the argument is the weight as it was."""
        spec, (low, high) = self.q.spec, bounds(self.q.spec)
        count = self.weight.numel() / self.scale.numel()
        scale = stored(scaled_gradient(self.scale, (count * max(1, high)) ** -0.5), spec)
        steps = self.weight / expand(scale, spec, self.q.shape)
        if self.q.zero is not None:
            steps = steps + expand(self.q.zero, spec, self.q.shape)
        return values_of(self.how.estimator.round(steps, low, high), scale, self.q)

    def export(self, W_NK: Tensor) -> QTensor:
        """The codes of `forward`."""
        spec = self.q.spec
        scale = stored(self.scale, spec).detach()
        steps = self.weight.detach() / expand(scale, spec, self.q.shape)
        if self.q.zero is not None:
            steps = steps + expand(self.q.zero, spec, self.q.shape)
        return QTensor(spec.grid.encode(steps), scale, self.q.zero, spec, self.q.shape)

    def learned(self) -> list[Learned]:
        """Weights and step sizes."""
        return [(self.weight, self.how.lr), (self.scale, self.how.lr_scale)]

    def after_step(self) -> None:
        """A step size stays positive."""
        keep_positive(self.scale, self.q)


@dataclass(frozen=True, slots=True)
class Lsq:
    """Learned weights and step sizes."""

    lr: float = 2e-4
    lr_scale: float = 2e-4
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
    lr: float = 2e-4,
    distill: float = 1.0,
    samples: int = 512,
    length: int = 512,
    gradient_checkpointing: bool = False,
) -> Recipe:
    """Ranges by least squares, then training of everything."""
    return Recipe(
        weights=int_spec(bits, group_size),
        range=MseClip(steps=24, floor=0.5, power=2.0),
        sampler=TextSampler(samples, length),
        trainer=Qat(
            Lsq(lr=lr),
            steps=steps,
            batch_size=batch_size,
            distill=distill,
            gradient_checkpointing=gradient_checkpointing,
        ),
    )
