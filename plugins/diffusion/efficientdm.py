"""EfficientDM: quantization-aware training of diffusion models by low-rank terms, without data (arXiv:2310.03270).

    Q = s (clamp(round((W + B A) / s + z)) - z);   A, B and s are learned, B from zero; nothing is left beside Q
    x is rounded with s_x(t), learned for every timestep;   rates of A and B: lr mean(s), "scale-aware"
    min E ||eps_q(x_t, t) - eps(x_t, t)||^2   over x_t of the full-precision model's own denoising, from noise

Shapes: W_NK weight, a convolution's unfolded; A `[r, K]`, B `[N, r]`; s, z `[N, G]`; s_x, z_x `[ranges, 1]`, a table.
Differs from the paper: trajectories are drawn once, and a step of the optimizer sees rows of many timesteps; weights
have a scale for every `group_size` columns; step sizes are learned relative to where they begin, z_x not at all; `lr`
is that of some hundred steps (the paper: 1 / 2500 for 16000); first and last layers get 8 bits by `overrides`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.diffusion.timed_inputs import timed_inputs
from hf_quant.plugins.diffusion.timed_rows import TimedRange
from hf_quant.plugins.training.fake_core import LowRankTerm, check_rank, keep_positive, ratio_rate
from hf_quant.qtensor import QTensor, expand
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.fakequant import Clipped, FakeQuant, Learned, bounds, latent, refuses_grid, stored, values_of
from hf_quant.stages.reconstruction import Mse
from hf_quant.stages.trainer import Qat
from hf_quant.stages.trajectories import Trajectories


class Rate(Protocol):
    """The learning rate of a layer's low-rank term."""

    def of(self, q: QTensor) -> float:
        """In units of the weight."""


@dataclass(frozen=True, slots=True)
class ScaleAware:
    """`lr` steps of the layer's own grid."""

    lr: float

    def of(self, q: QTensor) -> float:
        """`lr mean(s)`."""
        return self.lr * float(q.scale.mean())


@dataclass(frozen=True, slots=True)
class Single:
    """The same for every layer."""

    lr: float

    def of(self, q: QTensor) -> float:
        """`lr`."""
        return self.lr


class MergedLoraFake(FakeQuant):
    """A low-rank term on the weight, inside the rounding, and step sizes."""

    def __init__(self, W_NK: Tensor, q: QTensor, how: "MergedLora", generator: torch.Generator) -> None:
        super().__init__()
        self.q, self.how, self.rate = q, how, how.rate.of(q)
        zero = 0 if q.zero is None else expand(q.zero, q.spec, q.shape)
        self.register_buffer("frozen", (latent(W_NK, q) - zero) * expand(q.scale, q.spec, q.shape))
        rank = min(how.rank, *q.shape)
        self.term = LowRankTerm(q.shape, rank, float(rank), generator)
        self.ratio = nn.Parameter(torch.ones_like(q.scale))  # of step sizes, to the solver's

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Grid units before rounding, and step sizes as they are stored."""
        spec = self.q.spec
        scale = stored(self.ratio * self.q.scale, spec)
        steps = (self.frozen + self.term()) / expand(scale, spec, self.q.shape)
        return steps if self.q.zero is None else steps + expand(self.q.zero, spec, self.q.shape), scale

    def forward(self, W_NK: Tensor) -> Tensor:
        """See the module; the weight as it was is in the frozen part."""
        steps, scale = self._parts()
        return values_of(Clipped().round(steps, *bounds(self.q.spec)), scale, self.q)

    @torch.no_grad()
    def export(self, W_NK: Tensor) -> QTensor:
        """The codes of `forward`: the low-rank term is in them."""
        steps, scale = self._parts()
        return QTensor(self.q.spec.grid.encode(steps), scale, self.q.zero, self.q.spec, self.q.shape)

    def learned(self) -> list[Learned]:
        """A, B and step sizes."""
        rate = ratio_rate(self.how.lr_scale, self.q.spec)
        return [(self.term.A, self.rate), (self.term.B, self.rate), (self.ratio, rate)]

    def after_step(self) -> None:
        """A step size stays positive."""
        keep_positive(self.ratio)


@dataclass(frozen=True, slots=True)
class MergedLora:
    """Low-rank terms merged into the weight before it is rounded; of a smaller matrix, terms of its own rank."""

    rank: int = 32
    rate: Rate = ScaleAware(3e-2)
    lr_scale: float = 1e-3

    def __post_init__(self) -> None:
        check_rank(self.rank)

    def refuses(self, spec: Spec) -> str | None:
        """Integer grids."""
        return refuses_grid(spec)

    def start(self, W_NK: Tensor, q: QTensor, generator: torch.Generator) -> FakeQuant:
        """At the solver's codes."""
        return MergedLoraFake(W_NK, q, self, generator)


@method(
    "efficientdm",
    paper=Paper("2310.03270", "EfficientDM: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models"),
    domains={"diffusion"},
    claim="integers alone in the end, which compute what was trained; answers nearer to full precision than before",
)
def efficientdm(
    bits: int = 4,
    act_bits: int = 4,
    group_size: int = 64,
    rank: int = 32,
    steps: int = 300,
    batch_size: int = 8,
    lr: float = 3e-2,
    lr_scale: float = 1e-3,
    input_lr: float = 5e-3,
    calibration_steps: int = 20,
    ranges: int = 20,
    samples: int = 400,
    clip_steps: int = 24,
) -> Recipe:
    """Ranges of least squared error, then training of low-rank terms, step sizes and intervals by timestep.

    `lr` is of the low-rank terms in steps of the grid, `lr_scale` of the ends of the grid, by step sizes, in steps,
    `input_lr` of the logarithm of intervals.
    """
    return Recipe(
        weights=int_spec(bits, group_size),
        inputs=timed_inputs(act_bits, ranges, calibration_steps),
        sampler=Trajectories(steps=calibration_steps, samples=samples, batch_size=8),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        input_range=TimedRange(MseClip(steps=clip_steps, floor=0.3, power=2.0)),
        trainer=Qat(
            MergedLora(rank, ScaleAware(lr), lr_scale),
            loss=Mse(),
            input_lr=input_lr,
            steps=steps,
            batch_size=batch_size,
        ),
    )
