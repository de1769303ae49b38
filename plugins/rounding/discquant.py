"""DiscQuant: a quantization method for neural networks inspired by discrepancy theory (arXiv:2501.06417).

Every weight lies between its two neighbours on the grid. Of all points of that box that leave the network's answers
alone, a vertex is sought along a line that by itself would round to nearest:

    W_x = down + x (up - down),  0 <= x <= 1,   y = (W - down) / (up - down)
    min over x   -(2 y - 1) . x + rho KL( f(W) || f(W_x) ) / D,     D = 12 mean over all weights of (W - nearest(W))^2
    step of x:   g = -(2 y - 1) + clamp(rho dKL/dx / D, -kappa, kappa),  x <- clamp(x, 0, 1) after it

Shapes: W_NK weight, x and y like it; scale and zero `[N, K / group_size]`.
Differs from the paper: ranges are weighed by the inputs' squares; x begins at y; Adam, `batch` micro-batches of 4
sequences a step, half of the steps warm-up; no loss of layers in between; integer grids only; the best of several hard
checks is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.adaround import neighbours
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.fakequant import FakeQuant, Learned, refuses_grid, values_of
from hf_quant.stages.objective import LayerMse
from hf_quant.stages.reconstruction import Kl, Reconstruction, matrix_of
from hf_quant.stages.sampler import TextSampler
from hf_quant.stages.tuner import Example, Fitted, ModelUnit, Unit, UnitLoss


class BetweenFake(FakeQuant):
    """See the module; `rho` is in units of 1 / D."""

    def __init__(self, W_NK: Tensor, q: QTensor, how: "Between") -> None:
        super().__init__()
        self.q, self.how, self.hard = q, how, False
        self.down, self.y = neighbours(W_NK, q)
        self.x = nn.Parameter(self.y.clone())

    def forward(self, W_NK: Tensor) -> Tensor:
        """Between the two neighbours; on the nearer one when hard."""
        if self.hard:
            return self.export(W_NK).dequantize()
        return values_of(self.down + self.x, self.q.scale, self.q)

    def export(self, W_NK: Tensor) -> QTensor:
        """Up where x is at least one half."""
        q = self.q
        codes = q.spec.grid.encode(self.down + (self.x.detach() >= 0.5))
        return QTensor(codes, q.scale, q.zero, q.spec, q.shape)

    def learned(self) -> Sequence[Learned]:
        """x."""
        return [(self.x, self.how.lr)]

    def anneal(self, progress: float) -> None:
        """Only whether it is over."""
        self.hard = progress >= 1

    @torch.no_grad()
    def before_step(self) -> None:
        """The line, and no more of the loss than `kappa`."""
        if self.x.grad is None:  # no token came by: the line alone
            self.x.grad = torch.zeros_like(self.x)
        kappa = self.how.kappa
        self.x.grad.mul_(self.how.rho).clamp_(-kappa, kappa).sub_(2 * self.y - 1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Back into the box."""
        self.x.clamp_(0, 1)


@dataclass(frozen=True, slots=True)
class Between:
    """Between two neighbours, pulled to the nearer.

    Attributes:
        lr: learning rate of x.
        rho: of the loss, against the line.
        kappa: what the gradient of a weight is clipped to after that.
    """

    lr: float = 0.1
    rho: float = 200.0
    kappa: float = 1.0

    def refuses(self, spec: Spec) -> str | None:
        """Takes integer grids."""
        return refuses_grid(spec)

    def start(self, W_NK: Tensor, q: QTensor, generator: torch.Generator) -> FakeQuant:
        """See `Rounding.start`."""
        return BetweenFake(W_NK, q, self)


@dataclass(frozen=True, slots=True)
class DiscQuant:
    """Reconstruction of a unit by `Between`, its loss in units of D, which is one number for all weights.

    Attributes:
        rounding: with rho in units of 1 / D.
        loss: of the unit's output.
        steps: of the optimizer.
        batch: micro-batches a step.
    """

    rounding: Between = Between()
    loss: UnitLoss = Kl()
    steps: int = 100
    batch: int = 2

    def __post_init__(self) -> None:
        self.at(1.0)  # refuses what it refuses

    def at(self, D: float) -> Reconstruction:
        """The tuner, D known."""
        rounding = replace(self.rounding, rho=self.rounding.rho / D)
        return Reconstruction(rounding, loss=self.loss, steps=self.steps, batch=self.batch, checks=2, warmup=0.5)

    def refuses(self, weights: Spec, inputs: Spec | None) -> str | None:
        """See `Tuner.refuses`."""
        return self.at(1.0).refuses(weights, inputs)

    def tune(
        self, unit: Unit, start: Mapping[str, Fitted], examples: Sequence[Example], seed: int
    ) -> dict[str, Fitted]:
        """See `Tuner.tune`."""
        return self.at(spread(unit, start)).tune(unit, start, examples, seed)


def spread(unit: Unit, start: Mapping[str, Fitted]) -> float:
    """D: 12 times the mean squared error of the solver's codes over all of the unit's weights."""
    total, count = 0.0, 0
    for name, module in unit.sites.items():
        W_NK = matrix_of(module)
        total += float((W_NK - start[name].q.dequantize()).square().sum(dtype=torch.float64))
        count += W_NK.numel()
    return max(12 * total / count, 1e-30)


@method(
    "discquant",
    paper=Paper("2501.06417", "DiscQuant: A Quantization Method for Neural Networks Inspired by Discrepancy Theory"),
    domains={"llm"},
    claim="KL below gptq's at 3 bits in groups of 32 from 170 sequences; without the loss it is round to nearest",
)
def discquant(
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    steps: int = 100,
    batch: int = 2,
    lr: float = 0.1,
    rho: float = 200.0,
    kappa: float = 1.0,
    clip_steps: int = 24,
) -> Recipe:
    """Round to nearest in searched ranges, then the whole model's rounding against its own answers."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        sampler=TextSampler(batch_size=4),
        objective=LayerMse(),
        units=ModelUnit(),
        tuner=DiscQuant(Between(lr, rho, kappa), steps=steps, batch=batch),
    )
