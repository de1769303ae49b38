"""Fisher sensitivity: the KL that rounding a slot costs, to second order, from gradients alone.

    KL(p(W) || p(W - E)) = 1/2 E^T F E + O(E^3),   F = E_x E_{y ~ p(x)} [s s^T],   s = d log p(y|x) / dW

Labels are drawn from the model itself (with the seed), so none are needed and F is the Fisher matrix, not the empirical
one of the data's labels. Of a sequence all labels are drawn at once: scores of different tokens are uncorrelated, so
`<sum_t s_t, E>^2` has the mean `E^T (sum_t F_t) E`. One backward pass a sequence serves every choice of every slot.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_quant.plugins.allocation.one_site import cut, logits, samples, some
from hf_quant.sites import linear_shape
from hf_quant.stages.allocator import Rounded, Slot
from hf_quant.stages.sampler import Batch


@dataclass(frozen=True, slots=True)
class Fisher:
    """Half the Fisher form of the rounding error itself, in nats a token: all that second order knows."""

    rows: int = 64

    def losses(
        self, model: nn.Module, slots: Sequence[Slot], rounded: Rounded, batches: Sequence[Batch], seed: int
    ) -> list[tuple[float, ...]]:
        """See `Sensitivity.losses`."""
        names = [n for slot in slots for n in slot.sites]
        weights = {n: stored(model, n) for n in names}
        errors = [
            [
                {n: as_stored(model, n, rounded(n, spec)) - weights[n].detach().float() for n in slot.sites}
                for spec in slot.choices
            ]
            for slot in slots
        ]
        sums = [[0.0] * len(slot.choices) for slot in slots]
        tokens = 0
        generator = torch.Generator().manual_seed(seed)
        with differentiable(model, list(weights.values())):
            for row in single_rows(some(batches, self.rows)):
                z = logits(model, row)
                tokens += len(z)
                scores = torch.autograd.grad(_drawn(z, generator), list(weights.values()))
                of = dict(zip(names, scores, strict=True))
                for i, choices in enumerate(errors):
                    for c, E in enumerate(choices):
                        sums[i][c] += sum(float((of[n].float() * e).sum()) for n, e in E.items()) ** 2
        return [tuple(s / (2 * tokens) for s in row) for row in sums]


def _drawn(z_TV: Tensor, generator: torch.Generator) -> Tensor:
    """The log-likelihood of labels that the model draws itself."""
    log_p = z_TV.log_softmax(-1)
    labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(z_TV.device)
    return log_p.gather(-1, labels).sum()


def single_rows(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Every sample as a micro-batch of its own."""
    for batch in batches:
        yield from (cut(batch, slice(i, i + 1)) for i in range(samples(batch)))


def stored(model: nn.Module, name: str) -> Tensor:
    """The site's own parameter."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)  # noqa: S101  a float layer
    return weight


def as_stored(model: nn.Module, name: str, W_NK: Tensor) -> Tensor:
    """`W_NK` in the layout of the site's parameter."""
    found = linear_shape(model.get_submodule(name))
    return W_NK.T if found is not None and found[0] == "conv1d" else W_NK


@contextmanager
def differentiable(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Inside, gradients go to these weights and to no other parameter."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for w in weights:
            w.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
