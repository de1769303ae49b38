"""Linearity: a slot's loss is its sensitivity times the relative squared error of its weights (HIGGS's theorem).

    loss_l(b) = alpha_l t_l(b)^2,   t_l^2 = ||Q_b(W_l) - W_l||^2 / ||W_l||^2

alpha_l by least squares through the origin over Gaussian noise of several sizes put on slot l alone: the loss is the KL
of the outputs. Noise has no direction, so neither a solver nor its ranges enter alpha.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_quant.plugins.allocation.fisher import as_stored, stored
from hf_quant.plugins.allocation.one_site import kl_of, some
from hf_quant.stages.allocator import Rounded, Slot
from hf_quant.stages.sampler import Batch


@dataclass(frozen=True, slots=True)
class Linearity:
    """`alpha_l t_l^2`; `noises` are the relative sizes t of the noise that alpha is fitted to."""

    rows: int = 8
    noises: tuple[float, ...] = (0.05, 0.1, 0.2)

    def losses(
        self, model: nn.Module, slots: Sequence[Slot], rounded: Rounded, batches: Sequence[Batch], seed: int
    ) -> list[tuple[float, ...]]:
        """See `Sensitivity.losses`."""
        originals = {n: stored(model, n).detach().float() for slot in slots for n in slot.sites}
        alphas = self.alphas(model, slots, batches, seed)
        rows = []
        for slot, alpha in zip(slots, alphas, strict=True):
            size = sum(float(originals[n].square().sum()) for n in slot.sites)
            errors = [
                sum(float((as_stored(model, n, rounded(n, c)) - originals[n]).square().sum()) for n in slot.sites)
                for c in slot.choices
            ]
            rows.append(tuple(alpha * error / size for error in errors))
        return rows

    def alphas(self, model: nn.Module, slots: Sequence[Slot], batches: Sequence[Batch], seed: int) -> list[float]:
        """alpha of every slot, in nats a token."""
        generator = torch.Generator().manual_seed(seed)
        disturbed = [[_noisy(model, slot, t, generator) for t in self.noises] for slot in slots]
        found = kl_of(model, disturbed, some(batches, self.rows))
        squares = torch.tensor(self.noises, dtype=torch.float64) ** 2
        return [max(0.0, float((torch.tensor(kl).double() @ squares) / squares.square().sum())) for kl in found]


def _noisy(model: nn.Module, slot: Slot, t: float, generator: torch.Generator) -> dict[str, Tensor]:
    """The slot's weights with Gaussian noise of relative size t: site -> `W_NK`."""
    disturbed = {}
    for name in slot.sites:
        W = as_stored(model, name, stored(model, name).detach()).float()
        noise = torch.randn(W.shape, generator=generator).to(W.device)
        disturbed[name] = W + noise * (t * W.norm() / noise.norm())
    return disturbed
