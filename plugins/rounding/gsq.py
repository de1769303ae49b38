"""GSQ: highly-accurate low-precision scalar quantization by Gumbel-softmax sampling (arXiv:2604.18556).

Every weight has a logit for every level c_k of a small grid, and is the mean of a relaxed sample of them:

    W_soft = s exp(r) sum_k p_k c_k,   p = softmax((kappa l + g) / tau),   g ~ Gumbel;     W^ = s exp(r) c_argmax(l)
    l_k = 0.06 (-(c_k - c_GPTQ)^2 / 2), less its mean, at the start;   tau 2 -> 0.05 geometric, kappa 250 -> 500 linear

The attention of a block is fitted first, against its output, then the rest of it, against the block's.

Shapes: W_NK weight; l, g and p `[levels, N, K]`; s and r `[N, K / group_size]`.
Differs from the paper: q and k are fitted together with v and o, not against the attention's scores before them; no
random part in the first logits, so that it begins at GPTQ's codes; Adam without weight decay; higher learning rates for
fewer steps, over which less noise averages out, so kappa begins at 250 and not 100 (one block of tiny-lm, 60 steps: KL
0.0024 for 0.0028, GPTQ's 0.0031); grids of more than 8 levels have the 5 nearest to GPTQ's code; the best of several
hard checks is kept, GPTQ's codes where none was better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.sites import Site
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.fakequant import FakeQuant, Learned, bounds, refuses_grid, stored, values_of
from hf_quant.stages.objective import LayerMse
from hf_quant.stages.reconstruction import Reconstruction
from hf_quant.stages.sampler import Batch, TextSampler
from hf_quant.stages.tuner import Unit

PRIOR = 0.06  # of half the squared distance to the solver's code, in the first logits
TAU, KAPPA = (2.0, 0.05), (250.0, 500.0)
WHOLE, NEAR = 8, 2  # levels of a grid that is taken whole; of others, how far from the solver's code


class GumbelFake(FakeQuant):
    """See the module."""

    def __init__(self, W_NK: Tensor, q: QTensor, how: "Gumbel", generator: torch.Generator) -> None:
        super().__init__()
        self.q, self.how, self.generator = q, how, generator
        self.progress = 0.0
        value, (low, high) = q.spec.grid.decode(q.codes), bounds(q.spec)
        whole = high - low < WHOLE
        levels = torch.arange(low, high + 1) if whole else torch.arange(-NEAR, NEAR + 1)
        self.levels = levels.to(value)[:, None, None]
        self.middle = torch.zeros_like(value) if whole else value
        away = self.middle + self.levels - value
        prior = -PRIOR / 2 * away.square()
        self.l = nn.Parameter(prior - prior.mean(0))
        self.outside = (self.middle + self.levels < low) | (self.middle + self.levels > high)
        self.r = nn.Parameter(torch.zeros_like(q.scale))

    def scale(self) -> Tensor:
        """The steps as they will be stored."""
        return stored(self.q.scale * self.r.exp(), self.q.spec)

    def forward(self, W_NK: Tensor) -> Tensor:
        """The mean of a relaxed sample; the likeliest level when hard."""
        if self.progress >= 1:
            return self.export(W_NK).dequantize()
        tau = TAU[0] * (TAU[1] / TAU[0]) ** self.progress
        kappa = KAPPA[0] + (KAPPA[1] - KAPPA[0]) * self.progress
        uniform = torch.rand(self.l.shape, generator=self.generator).clamp_(1e-8, 1 - 1e-7)
        gumbel = uniform.log_().neg_().log_().neg_().to(self.l.device)
        p = ((kappa * self.l + gumbel) / tau).masked_fill(self.outside, -math.inf).softmax(0)
        return values_of(self.middle + (p * self.levels).sum(0), self.scale(), self.q)

    def export(self, W_NK: Tensor) -> QTensor:
        """The likeliest levels."""
        q = self.q
        best = self.l.detach().masked_fill(self.outside, -math.inf).argmax(0)
        value = self.middle + self.levels.flatten()[best]
        return QTensor(q.spec.grid.encode(value), self.scale().detach(), q.zero, q.spec, q.shape)

    def learned(self) -> Sequence[Learned]:
        """Logits, and the logarithm of the steps."""
        return [(self.l, self.how.lr), (self.r, self.how.scale_lr)]

    def anneal(self, progress: float) -> None:
        """How far the relaxation has come."""
        self.progress = progress


@dataclass(frozen=True, slots=True)
class Gumbel:
    """A logit for every level of every weight.

    Attributes:
        lr: learning rate of the logits.
        scale_lr: of the logarithm of the steps.
    """

    lr: float = 3e-3
    scale_lr: float = 1e-3

    def refuses(self, spec: Spec) -> str | None:
        """Takes integer grids."""
        return refuses_grid(spec)

    def start(self, W_NK: Tensor, q: QTensor, generator: torch.Generator) -> FakeQuant:
        """See `Rounding.start`."""
        return GumbelFake(W_NK, q, self, generator)


@dataclass(frozen=True, slots=True)
class StageUnits:
    """Of every block first the part that runs first and holds sites (its attention), then the whole, for the others."""

    def units(
        self, model: nn.Module, blocks: Sequence[str], sites: Sequence[Site], batches: Sequence[Batch] = ()
    ) -> list[Unit]:
        """One or two a block that holds sites."""
        found = []
        for block in blocks:
            parts: dict[str, dict[str, nn.Module]] = {}
            for site in (s for s in sites if s.block == block):
                part = ".".join(site.name.split(".")[: block.count(".") + 2])
                parts.setdefault(part, {})[site.name] = model.get_submodule(site.name)
            first = next(iter(parts)) if len(parts) > 1 else None
            if first is not None:
                found.append(Unit(first, model.get_submodule(first), parts.pop(first)))
            if parts:
                rest = {name: module for part in parts.values() for name, module in part.items()}
                found.append(Unit(block, model.get_submodule(block), rest))
        return found


@method(
    "gsq",
    paper=Paper(
        "2604.18556", "GSQ: Highly-Accurate Low-Precision Scalar Quantization for LLMs via Gumbel-Softmax Sampling"
    ),
    domains={"llm", "moe"},
    claim="KL to full precision below gptq's and adaround's at 2 bits, symmetric, in groups of 32",
)
def gsq(
    bits: int = 2,
    group_size: int = 128,
    symmetric: bool = True,
    steps: int = 100,
    lr: float = 3e-3,
    scale_lr: float = 1e-3,
    damp: float = 0.01,
    clip_steps: int = 24,
) -> Recipe:
    """GPTQ, then sampled assignments and steps learned against the outputs of attention and blocks."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        sampler=TextSampler(batch_size=2),
        objective=LayerMse(),
        solver=Gptq(damp=damp),
        units=StageUnits(),
        tuner=Reconstruction(Gumbel(lr, scale_lr), steps=steps),
    )
