"""AdaRound: up or down? Adaptive rounding for post-training quantization (arXiv:2004.10568).

Learns for every weight whether it goes down or up, against what its unit puts out:

    W^ = s (clamp(floor(W/s + z) + h(V)) - z),   h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)
    loss + weight * mean(1 - |2h - 1|^beta),     beta from 20 to 2, after a first fifth of the steps without it

Shapes: W_NK weight; V_NK like it; scale and zero `[N, K / group_size]`, as the solver left them.
Differs from the paper: units are blocks (`layers=True`: single layers), fed by the quantized path; begins at what the
solver gave, V so that h is the part of W/s above the lower of the two neighbours; the penalty is a mean, in units of
the hard loss at the start, so that one weight suits every model; Adam at 1e-2 with a cosine schedule and 1000 steps
(the paper: 1e-3 and 20000); the best of several hard checks is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.fakequant import FakeQuant, Learned, bounds, refuses_grid, steps_of, values_of
from hf_quant.stages.reconstruction import Reconstruction
from hf_quant.stages.sampler import TextSampler
from hf_quant.stages.tuner import BlockUnits, LayerUnits

LOW, HIGH = -0.1, 1.1  # what the sigmoid is stretched to before it is clipped
FREE = 0.2  # of the steps have no penalty


def neighbours(W_NK: Tensor, q: QTensor) -> tuple[Tensor, Tensor]:
    """(below, at): of the two codes on either side of a weight, one of them the solver's, the lower; and the weight
    in steps above it, inside [0, 1] and on the solver's side of one half."""
    value = q.spec.grid.decode(q.codes)
    steps = steps_of(W_NK, q)
    low, high = bounds(q.spec)
    below = torch.where(steps >= value, value, value - 1).clamp(low, high - 1)
    at = (steps - below).clamp(0, 1)
    up = value > below
    return below, torch.where(up, at.clamp_min(0.5), at.clamp_max(0.4999))


class AdaRoundFake(FakeQuant):
    """See the module."""

    def __init__(self, W_NK: Tensor, q: QTensor, lr: float, weight: float) -> None:
        super().__init__()
        self.q, self.lr, self.weight, self.hard = q, lr, weight, False
        self.below, at = neighbours(W_NK, q)
        inner = (at.clamp(0.001, 0.999) - LOW) / (HIGH - LOW)
        self.V = nn.Parameter((inner / (1 - inner)).log())

    def h(self) -> Tensor:
        """How far up, in [0, 1]."""
        return (self.V.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def forward(self, W_NK: Tensor) -> Tensor:
        """Between the two neighbours; on one of them when hard."""
        if self.hard:
            return self.export(W_NK).dequantize()
        return values_of(self.below + self.h(), self.q.scale, self.q)

    def export(self, W_NK: Tensor) -> QTensor:
        """Up where V >= 0."""
        q = self.q
        codes = q.spec.grid.encode(self.below + (self.V.detach() >= 0))
        return QTensor(codes, q.scale, q.zero, q.spec, q.shape)

    def learned(self) -> Sequence[Learned]:
        """V."""
        return [(self.V, self.lr)]

    def anneal(self, progress: float) -> Tensor | None:
        """The penalty, after the first steps."""
        self.hard = progress >= 1
        if self.hard or progress < FREE:
            return None
        beta = 20 - 18 * (progress - FREE) / (1 - FREE)
        return self.weight * (1 - (2 * self.h() - 1).abs().pow(beta)).mean()


@dataclass(frozen=True, slots=True)
class AdaRound:
    """Down or up for every weight.

    Attributes:
        lr: learning rate of V.
        weight: of the penalty, in units of the loss at the start.
    """

    lr: float = 1e-2
    weight: float = 100.0

    def refuses(self, spec: Spec) -> str | None:
        """Takes integer grids."""
        return refuses_grid(spec)

    def start(self, W_NK: Tensor, q: QTensor, generator: torch.Generator) -> FakeQuant:
        """See `Rounding.start`."""
        return AdaRoundFake(W_NK, q, self.lr, self.weight)


@method(
    "adaround",
    paper=Paper("2004.10568", "Up or Down? Adaptive Rounding for Post-Training Quantization"),
    domains={"llm", "vit", "vlm", "moe"},
    claim="KL to full precision below rtn's at 3 bits in groups of 64; never worse than its start on the data",
)
def adaround(
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    steps: int = 1000,
    layers: bool = False,
    clip_steps: int = 24,
) -> Recipe:
    """Round to nearest in searched ranges, then learned rounding of one block (or layer) after the other."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        sampler=TextSampler(batch_size=2),
        units=LayerUnits() if layers else BlockUnits(),
        tuner=Reconstruction(AdaRound(), steps=steps),
    )
