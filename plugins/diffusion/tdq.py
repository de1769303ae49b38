"""TDQ: temporal dynamic quantization, here its post-training form (arXiv:2306.02316).

    s(t) = s_0 softplus(c + MLP(enc(t))),    enc(t) = (sin, cos)(pi 2^i t),  softplus(c) = 1
    min over the MLP   mean over timesteps of  E |x - Q(x; s(t), z(t))|^2 / E x^2,    ds by LSQ's straight-through rule

Every input has an interval that is a smooth function of the timestep. At inference it is a table.

Shapes: W_NK weight, scale `[N, 1]`; s and z of a layer's input `[ranges, 1]`, one row for each of `ranges` timesteps.
Differs from the paper: each layer's function is trained alone, on sampled inputs against their own rounding error, not
with the network or against a block's output; z(t) stays where the extremes of that timestep put it; t is the place of
the timestep among those of the table; the best intervals seen are kept; `ranges=1` is a static learned interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.diffusion.timed_inputs import timed_inputs
from hf_quant.plugins.diffusion.timed_rows import TimedRows
from hf_quant.qtensor import round_scale
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.fakequant import Clipped, bounds
from hf_quant.stages.range import Extremes
from hf_quant.stages.trajectories import Trajectories
from hf_quant.stats import Stat, Stats

VALUES = 1024  # of an input that are looked at for each timestep
FREQUENCIES = 6
ONE = math.log(math.e - 1)  # softplus of it is 1


def encode(entries: int) -> Tensor:
    """`[entries, 2 FREQUENCIES]`: sines and cosines of the place t in 0 .. 1, the frequency doubling."""
    t = torch.linspace(0, 1, entries)[:, None] if entries > 1 else torch.zeros(1, 1)
    angles = t * math.pi * 2.0 ** torch.arange(FREQUENCIES)
    return torch.cat([angles.sin(), angles.cos()], 1)


def layers(width: int, generator: torch.Generator) -> list[Tensor]:
    """Weights and biases of four layers; the last is zero, so that every interval begins at the static one."""
    sizes, made = (2 * FREQUENCIES, width, width, width, 1), []
    for i, o in pairwise(sizes):
        made += [torch.randn(o, i, generator=generator) * math.sqrt(2 / i) * (o > 1), torch.zeros(o)]
    return made


def intervals(parameters: Sequence[Tensor], static: Tensor, entries: int) -> Tensor:
    """`s(t)` of every timestep, `[entries, 1]`."""
    x = encode(entries).to(static.device)
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        x = F.linear(x, weight, bias)
        x = F.relu(x) if weight.shape[0] > 1 else x
    return static * F.softplus(x + ONE)


@dataclass(frozen=True, slots=True)
class TdqRange:
    """See the module.

    Attributes:
        iterations: of Adam.
        lr: its learning rate.
        width: of the network's layers.
        rows: sampled inputs.
    """

    iterations: int = 200
    lr: float = 3e-3
    width: int = 64
    rows: int = 1024

    def needs(self, spec: Spec) -> tuple[Stat, ...]:
        """Extremes by timestep, and rows with theirs."""
        return (*Extremes().needs(spec), TimedRows(self.rows))

    def fit_inputs(self, stats: Stats, spec: Spec) -> tuple[Tensor, Tensor | None]:
        """See `InputRange.fit_inputs`."""
        covering = Extremes()
        _, zero = covering.fit_inputs(stats, spec)
        timed = TimedRows(self.rows)
        x, entry = timed.values(stats[timed])
        generator = torch.Generator().manual_seed(0)
        at = entry.unique()
        values = [_some(x[entry == e].flatten(), generator) for e in at.tolist()]
        ends = stats[covering.needs(spec)[0]]
        edges = torch.stack(
            [ends["min"].reshape(-1)[at], ends["max"].reshape(-1)[at]], 1
        )  # rare, and what clipping costs
        x_EV = torch.cat([torch.stack(values), edges.to(x)], 1)
        static, _ = MseClip(steps=24, floor=0.3, power=2.0).fit(x_EV, spec)
        return round_scale(self._train(x_EV, at, static, zero, spec, generator), spec), zero

    @torch.enable_grad()
    def _train(
        self, x_EV: Tensor, at: Tensor, static: Tensor, zero: Tensor | None, spec: Spec, generator: torch.Generator
    ) -> Tensor:
        """The best table `[entries, 1]` seen."""
        parameters = [p.to(x_EV.device).requires_grad_() for p in layers(self.width, generator)]
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.iterations))
        z = torch.zeros(len(at), 1, device=x_EV.device) if zero is None else zero[at]
        energy = x_EV.square().mean(1, keepdim=True).clamp_min(1e-20)
        least, best = torch.inf, static.expand(spec.entries, 1)
        for _ in range(self.iterations + 1):
            table = intervals(parameters, static, spec.entries)
            s = table[at]
            rounded = (Clipped().round(x_EV / s + z, *bounds(spec)) - z) * s
            loss = ((rounded - x_EV).square() / energy).mean()
            if loss.item() < least:
                least, best = loss.item(), table.detach()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return best.contiguous()


def _some(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randint(len(values), (VALUES,), generator=generator).to(values.device)]


@method(
    "tdq",
    paper=Paper("2306.02316", "Temporal Dynamic Quantization for Diffusion Models"),
    domains={"diffusion"},
    claim="error of the pictures below that with static learned intervals, 4-bit weights and inputs",
)
def tdq(
    bits: int = 8,
    act_bits: int = 8,
    calibration_steps: int = 20,
    ranges: int = 20,
    samples: int = 128,
    iterations: int = 200,
    lr: float = 3e-3,
    clip_steps: int = 24,
) -> Recipe:
    """An interval for each of `ranges` timesteps, learned as a function of t."""
    return Recipe(
        weights=int_spec(bits, -1, symmetric=True),
        inputs=timed_inputs(act_bits, ranges, calibration_steps),
        sampler=Trajectories(steps=calibration_steps, samples=samples),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        input_range=TdqRange(iterations=iterations, lr=lr),
    )
