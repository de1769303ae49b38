"""LSQ: learned step size quantization (arXiv:1902.08153), here after GPTQ and against the whole model's KL.

What is learned of a weight is its place U on the grid, in steps, and the step s of its group:

    W^ = s (clamp(round(U)) - z),   dW^/dU = s inside the grid (straight-through),   dW^/ds = round(U) - z
    min over U, s   KL( softmax f(x; W) || softmax f(x; W^) ),   the mean over tokens of the calibration data

Shapes: W_NK weight; U_NK; s and z `[N, K / group_size]`.
Differs from the paper: begins at GPTQ's codes and steps and takes some hundred steps of Adam, where the paper trains a
network on its labelled data; U keeps the float weight where GPTQ rounded it to the nearest code, and is put on
GPTQ's side of the threshold elsewhere; s is learned as a logarithm and rounded to its stored type in every forward;
Adam makes the paper's scaling of its gradient needless; zero points stay. A changed step moves values and leaves codes
(the paper's own form, see `lsq`, moves codes: after 24 steps at 2 bits on tiny-lm its KL was 0.072, this one's 0.066).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.fakequant import (
    Clipped,
    FakeQuant,
    Learned,
    bounds,
    latent,
    refuses_grid,
    stored,
    values_of,
)
from hf_quant.stages.objective import LayerMse
from hf_quant.stages.reconstruction import Kl, Reconstruction
from hf_quant.stages.sampler import TextSampler
from hf_quant.stages.tuner import ModelUnit

EDGE = 0.45  # how far from its code a weight may start, in steps: short of the threshold


class PlacesFake(FakeQuant):
    """See the module."""

    def __init__(self, W_NK: Tensor, q: QTensor, lr: float, scale_lr: float) -> None:
        super().__init__()
        self.q, self.lr, self.scale_lr = q, lr, scale_lr
        self.U = nn.Parameter(latent(W_NK, q, EDGE))
        self.r = nn.Parameter(torch.zeros_like(q.scale))

    def scale(self) -> Tensor:
        """The steps as they will be stored."""
        return stored(self.q.scale * self.r.exp(), self.q.spec)

    def forward(self, W_NK: Tensor) -> Tensor:
        """The value of the codes, to the bit."""
        return values_of(Clipped().round(self.U, *bounds(self.q.spec)), self.scale(), self.q)

    def export(self, W_NK: Tensor) -> QTensor:
        """The nearest codes to U."""
        q = self.q
        return QTensor(q.spec.grid.encode(self.U.detach()), self.scale().detach(), q.zero, q.spec, q.shape)

    def learned(self) -> Sequence[Learned]:
        """U and the logarithm of the steps."""
        return [(p, lr) for p, lr in ((self.U, self.lr), (self.r, self.scale_lr)) if lr]


@dataclass(frozen=True, slots=True)
class Places:
    """Places on the grid and its steps, straight-through.

    Attributes:
        lr: learning rate of U, in steps of the grid; 0 keeps the codes.
        scale_lr: of the logarithm of the steps; 0 keeps them.
    """

    lr: float = 1e-3
    scale_lr: float = 1e-3

    def refuses(self, spec: Spec) -> str | None:
        """Takes integer grids."""
        return refuses_grid(spec)

    def start(self, W_NK: Tensor, q: QTensor, generator: torch.Generator) -> FakeQuant:
        """See `Rounding.start`."""
        return PlacesFake(W_NK, q, self.lr, self.scale_lr)


@method(
    "lsq-ptq",
    paper=Paper("1902.08153", "Learned Step Size Quantization"),
    domains={"llm", "vit"},
    claim="KL to full precision below gptq's, where it begins, at 3 and 2 bits, on text that was not calibrated on",
)
def lsq_ptq(
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    steps: int = 120,
    lr: float = 3e-3,
    scale_lr: float = 1e-3,
    damp: float = 0.01,
    clip_steps: int = 24,
) -> Recipe:
    """GPTQ, then weights and steps of the whole model learned together against its full-precision output."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        sampler=TextSampler(batch_size=4),
        objective=LayerMse(),
        solver=Gptq(damp=damp),
        units=ModelUnit(),
        tuner=Reconstruction(Places(lr=lr, scale_lr=scale_lr), loss=Kl(), steps=steps, checks=2),
    )
