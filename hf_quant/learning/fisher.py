"""Squared gradients of the loss: how much it minds a change of each weight (the diagonal of the empirical Fisher)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_quant.errors import CalibrationError
from hf_quant.stages.objective import Fisher, Loss
from hf_quant.stages.sampler import Batch
from hf_quant.stats import Stat, State


def squared_gradients(
    model: nn.Module, batches: Sequence[Batch], loss: Loss, sites: Sequence[str]
) -> dict[str, Tensor]:
    """`sum over samples (d loss / d W)^2` for the weights of the sites, float64 `[N, K]`.

    Each sample counts for itself: squares of the gradient of a mean would vanish with the size of the batch. A weight
    that the loss does not depend on gets zeros.

    Raises:
        CalibrationError: the model computes no loss on the data, or one that is no number.
    """
    weights: dict[str, Tensor] = {}
    for name in sites:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)  # noqa: S101  a site's
        weights[name] = weight
    device = next(iter(weights.values())).device
    squares = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    trained = {p: p.requires_grad for p in model.parameters()}
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for sample in (s for batch in batches for s in samples(batch)):
            with torch.enable_grad():
                value = loss.loss(model, {name: tensor.to(device) for name, tensor in sample.items()})
                if not isinstance(value, Tensor) or not value.requires_grad or not bool(torch.isfinite(value)):
                    raise CalibrationError(
                        f"sensitivities are gradients of the model's loss, and on this data that is {value}: pass "
                        'batches with "labels", or use a method without sensitivities'
                    )
                gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            for square, gradient in zip(squares.values(), gradients, strict=True):
                if gradient is not None:
                    square += gradient.float().square()
    finally:
        for parameter, before in trained.items():
            parameter.requires_grad_(before)
    return squares


def samples(batch: Batch) -> list[Batch]:
    """The micro-batch as batches of one sample; what is not one a sample (a `[]` tag) goes to each."""
    size = len(next(iter(batch.values())))
    own = {name: t.dim() > 0 and len(t) == size for name, t in batch.items()}
    return [{name: t[i : i + 1] if own[name] else t for name, t in batch.items()} for i in range(size)]


def fisher_states(
    model: nn.Module, batches: Sequence[Batch], wanted: dict[str, tuple[Stat, ...]]
) -> dict[str, dict[Stat, State]]:
    """Site -> statistic -> state, for what sites want of gradients; empty when none wants any."""
    states: dict[str, dict[Stat, State]] = {}
    for fisher in dict.fromkeys(s for stats in wanted.values() for s in stats if isinstance(s, Fisher)):
        sites = [name for name, stats in wanted.items() if fisher in stats]
        for name, square in squared_gradients(model, batches, fisher.loss, sites).items():
            states.setdefault(name, {})[fisher] = {"square": square}
    return states


def of_inputs(needs: Sequence[Stat]) -> tuple[Stat, ...]:
    """Those statistics that the inputs of a site show."""
    return tuple(stat for stat in needs if not isinstance(stat, Fisher))
