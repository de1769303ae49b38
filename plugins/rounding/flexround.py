"""FlexRound: learnable rounding by element-wise division (arXiv:2306.00317).

Every weight is divided by a scale of its own before it is rounded, so it may move by several levels, and large weights
further than small ones for the same change of their scale:

    W^ = s exp(r) (clamp(round(W / (s exp(r + D_NK + d_N)) + z)) - z),   r, D and d learned, all zero at the start

Shapes: W_NK weight; D `[N, K]`; d `[N, 1]`; s, z and r `[N, K / group_size]`, or one of each for the tensor.
Differs from the paper: steps of groups and rows besides those of a tensor; begins at searched ranges, and at whatever
codes a solver left; s exp(r) is rounded to its stored type in every forward; learning rates halve with every bit, as a
step's share of the range does; convolutions get no further factor for their input channels; 300 steps of Adam a block
(the paper: 5000), fed by the quantized path (with rounded inputs: as `qdrop` does), the best hard check kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.qtensor import QTensor, expand
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, act_spec, int_spec
from hf_quant.stages.fakequant import (
    Clipped,
    FakeQuant,
    Learned,
    Rounding,
    bounds,
    latent,
    refuses_grid,
    stored,
    values_of,
)
from hf_quant.stages.reconstruction import Reconstruction
from hf_quant.stages.sampler import TextSampler


class ElementWise(nn.Module):
    """`D + d`: the logarithm of what a weight is divided by."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros(shape, device=device))
        self.d = nn.Parameter(torch.zeros(shape[0], 1, device=device))

    def forward(self) -> Tensor:
        """`[N, K]`."""
        return self.D + self.d


class FlexRoundFake(FakeQuant):
    """See the module; `divisor()` is the logarithm `[N, K]` of what the weights are divided by, besides their steps."""

    def __init__(self, W_NK: Tensor, q: QTensor, divisor: nn.Module, lr: float, scale_lr: float) -> None:
        super().__init__()
        low, high = bounds(q.spec)
        share = 16 / (high - low + 1)  # of a step in the range, against 4 bits
        self.q, self.divisor, self.lr, self.scale_lr = q, divisor, lr * share, scale_lr * share
        self.start = values_of(latent(W_NK, q), torch.ones_like(q.scale), q)  # W / s, in the cells of the codes
        self.r = nn.Parameter(torch.zeros_like(q.scale))

    def steps(self) -> Tensor:
        """Before rounding, in steps of the grid."""
        q = self.q
        steps: Tensor = self.start * (-(expand(self.r, q.spec, q.shape) + self.divisor())).exp()
        return steps if q.zero is None else steps + expand(q.zero, q.spec, q.shape)

    def scale(self) -> Tensor:
        """The steps of the grid as they will be stored."""
        return stored(self.q.scale * self.r.exp(), self.q.spec)

    def forward(self, W_NK: Tensor) -> Tensor:
        """The value of the codes, to the bit."""
        return values_of(Clipped().round(self.steps(), *bounds(self.q.spec)), self.scale(), self.q)

    def export(self, W_NK: Tensor) -> QTensor:
        """The codes of `forward`."""
        q = self.q
        return QTensor(q.spec.grid.encode(self.steps().detach()), self.scale().detach(), q.zero, q.spec, q.shape)

    def learned(self) -> Sequence[Learned]:
        """r and what the divisor is made of."""
        return [(self.r, self.scale_lr), *((p, self.lr) for p in self.divisor.parameters())]


@dataclass(frozen=True, slots=True)
class FlexRound:
    """A divisor for every weight.

    Attributes:
        lr: learning rate of the logarithms D and d at 4 bits.
        scale_lr: of that of the steps.
    """

    lr: float = 3e-3
    scale_lr: float = 1e-3

    def refuses(self, spec: Spec) -> str | None:
        """Takes integer grids."""
        return refuses_grid(spec)

    def start(self, W_NK: Tensor, q: QTensor, generator: torch.Generator) -> FakeQuant:
        """See `Rounding.start`."""
        return FlexRoundFake(W_NK, q, ElementWise(q.shape, W_NK.device), self.lr, self.scale_lr)


def blockwise(
    rounding: Rounding, bits: int, act_bits: int | None, group_size: int, per_tensor: bool, steps: int, clip_steps: int
) -> Recipe:
    """Nearest in searched ranges, static inputs where they have bits, then `rounding`, one block after the other."""
    rows, share = int_spec(bits, group_size), 1.0 if act_bits is None else 0.5
    return Recipe(
        weights=Spec(grid=rows.grid, block=(-1, -1), zero="int") if per_tensor else rows,
        inputs=None if act_bits is None else act_spec(act_bits, static=True, symmetric=False),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        sampler=TextSampler(batch_size=2),
        tuner=Reconstruction(rounding, steps=steps, share=share, input_lr=1e-3),
    )


@method(
    "flexround",
    paper=Paper(
        "2306.00317", "FlexRound: Learnable Rounding Based on Element-Wise Division for Post-Training Quantization"
    ),
    domains={"llm", "vit"},
    claim="KL at most adaround's at 4 bits a row, at equal steps; begins at round to nearest",
)
def flexround(
    bits: int = 4,
    act_bits: int | None = None,
    group_size: int = 128,
    per_tensor: bool = False,
    steps: int = 300,
    lr: float = 3e-3,
    scale_lr: float = 1e-3,
    clip_steps: int = 24,
) -> Recipe:
    """Learned divisors of the weights, block by block; `per_tensor`: one step for a matrix; `act_bits`: inputs too."""
    return blockwise(FlexRound(lr, scale_lr), bits, act_bits, group_size, per_tensor, steps, clip_steps)
