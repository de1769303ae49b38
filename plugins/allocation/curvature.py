"""Curvature sensitivities: a number a slot from the Hessian of a loss, times the rounding error of its weights.

    HutchinsonTrace  tr(H_l) / n_l * ||Q_l(W) - W||^2,  tr(H_l) = E v^T H v over random signs v
    TopEigenvalue    lambda_max(H_l) / n_l * ||Q_l(W) - W||^2,  by power iteration on Hessian-vector products

H_l is the Hessian of the mean loss of some samples with respect to the weights of slot l (n_l of them). Hessian-vector
products are exact: the gradient is differentiated once more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_quant.plugins.allocation.fisher import as_stored, differentiable, stored
from hf_quant.plugins.allocation.one_site import logits, some
from hf_quant.stages.allocator import Rounded, Slot
from hf_quant.stages.objective import Loss
from hf_quant.stages.sampler import Batch

Vectors = list[Tensor]


@dataclass(frozen=True, slots=True)
class SelfDistillation:
    """KL of the model to what it says now: needs no labels, its Hessian here is the Fisher matrix, never negative."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Zero in value; its second derivative is what counts."""
        log_q = logits(model, batch).log_softmax(-1)
        log_p = log_q.detach()
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@dataclass(frozen=True, slots=True)
class HutchinsonTrace:
    """Mean curvature: probes are drawn until the standard error of every slot's trace is below `tolerance` of it."""

    loss: Loss = SelfDistillation()
    rows: int = 2
    least: int = 8
    most: int = 50
    tolerance: float = 0.05

    def losses(
        self, model: nn.Module, slots: Sequence[Slot], rounded: Rounded, batches: Sequence[Batch], seed: int
    ) -> list[tuple[float, ...]]:
        """See `Sensitivity.losses`."""
        generator = torch.Generator().manual_seed(seed)

        def traces(product: Callable[[Vectors], Vectors], weights: Vectors, slices: Sequence[slice]) -> list[float]:
            drawn = torch.empty(0, len(slices), dtype=torch.float64)
            while len(drawn) < self.most:
                vs = [torch.randint(0, 2, w.shape, generator=generator).mul(2).sub(1).to(w) for w in weights]
                row = [_dot(vs[s], hvs[s]) for hvs in [product(vs)] for s in slices]
                drawn = torch.cat([drawn, torch.tensor([row], dtype=torch.float64)])
                error = drawn.std(0) / len(drawn) ** 0.5 if len(drawn) > 1 else torch.tensor(torch.inf)
                if len(drawn) >= self.least and bool((error <= self.tolerance * drawn.mean(0).abs()).all()):
                    break
            return drawn.mean(0).tolist()

        return _scaled_errors(model, slots, rounded, some(batches, self.rows), self.loss, traces)


@dataclass(frozen=True, slots=True)
class TopEigenvalue:
    """Largest curvature: power iteration until the value changes by less than `tolerance`."""

    loss: Loss = SelfDistillation()
    rows: int = 2
    most: int = 20
    tolerance: float = 0.05

    def losses(
        self, model: nn.Module, slots: Sequence[Slot], rounded: Rounded, batches: Sequence[Batch], seed: int
    ) -> list[tuple[float, ...]]:
        """See `Sensitivity.losses`."""
        generator = torch.Generator().manual_seed(seed)

        def eigenvalues(
            product: Callable[[Vectors], Vectors], weights: Vectors, slices: Sequence[slice]
        ) -> list[float]:
            return [self._largest(product, weights, s, generator) for s in slices]

        return _scaled_errors(model, slots, rounded, some(batches, self.rows), self.loss, eigenvalues)

    def _largest(
        self, product: Callable[[Vectors], Vectors], weights: Vectors, s: slice, generator: torch.Generator
    ) -> float:
        """Of the diagonal block of these weights: the vector is zero elsewhere."""
        vs = [torch.zeros_like(w) for w in weights]
        vs[s] = _unit([torch.randn(w.shape, generator=generator).to(w) for w in weights[s]])
        before = 0.0
        for _ in range(self.most):
            hvs = product(vs)[s]
            value = _dot(vs[s], hvs)
            if not any(bool(h.any()) for h in hvs) or abs(value - before) <= self.tolerance * abs(value):
                return value
            vs[s], before = _unit(hvs), value
        return before


Measure = Callable[[Callable[[Vectors], Vectors], Vectors, Sequence[slice]], list[float]]


def _scaled_errors(
    model: nn.Module, slots: Sequence[Slot], rounded: Rounded, batches: Sequence[Batch], loss: Loss, measure: Measure
) -> list[tuple[float, ...]]:
    """`max(measure, 0) / n * ||E||^2` of every choice; `measure` is given `v -> H v` over all slots' weights."""
    names = [n for slot in slots for n in slot.sites]
    weights = [stored(model, n) for n in names]
    ends = [sum(len(slot.sites) for slot in slots[: i + 1]) for i in range(len(slots))]
    slices = [slice(end - len(slot.sites), end) for slot, end in zip(slots, ends, strict=True)]
    with differentiable(model, weights), sdpa_kernel(SDPBackend.MATH):  # the one kernel that differentiates twice
        product = hessian_product([partial(loss.loss, model, b) for b in batches], weights)
        values = measure(product, weights, slices)
    rows = []
    for slot, value, s in zip(slots, values, slices, strict=True):
        factor = max(value, 0.0) / sum(w.numel() for w in weights[s])
        originals = {n: stored(model, n).detach().float() for n in slot.sites}
        squares = [
            sum(float((as_stored(model, n, rounded(n, c)) - W).square().sum()) for n, W in originals.items())
            for c in slot.choices
        ]
        rows.append(tuple(factor * square for square in squares))
    return rows


def hessian_product(losses: Sequence[Callable[[], Tensor]], weights: Vectors) -> Callable[[Vectors], Vectors]:
    """`v -> H v`, H the Hessian of the mean of the losses with respect to the weights."""
    gradients = []
    for loss in losses:
        gradients.append(torch.autograd.grad(loss(), weights, create_graph=True))

    def product(vs: Vectors) -> Vectors:
        total = [torch.zeros_like(w) for w in weights]
        for gradient in gradients:
            along = torch.stack([(g * v).sum() for g, v in zip(gradient, vs, strict=True)]).sum()
            for t, h in zip(total, torch.autograd.grad(along, weights, retain_graph=True), strict=True):
                t += h / len(gradients)
        return total

    return product


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _unit(vs: Sequence[Tensor]) -> Vectors:
    norm = _dot(vs, vs) ** 0.5
    return [v / max(norm, 1e-30) for v in vs]
