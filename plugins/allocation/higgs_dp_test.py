"""HIGGS's allocation: the theorem predicts the loss of a trained model, and what is chosen by it."""

import pytest
import torch

from hf_quant.plugins.allocation.linearity import Linearity
from hf_quant.plugins.allocation.one_site import kl_of
from hf_quant.sites import walk
from hf_quant.spec import int_spec
from hf_quant.stages.allocator import Slot

SEEDS = range(3)


@pytest.mark.slow
def test_claim(claims, distance, at_three_bits) -> None:  # type: ignore[no-untyped-def]
    ours = [distance(at_three_bits("higgs-dp"), seed) for seed in SEEDS]
    theirs = [distance(at_three_bits("uniform"), seed) for seed in SEEDS]
    claims.order("higgs-dp", "KL at most uniform's at the size of 3 bits in groups of 64", ours=ours, theirs=theirs)


@pytest.mark.slow
def test_linearity(claims, judge) -> None:  # type: ignore[no-untyped-def]
    """Noise of twelve patterns over all layers of tiny-lm at once, t^2 < 0.05 each: `sum alpha t^2` against the KL."""
    model, batches = judge.model(), [{"input_ids": judge.data(0)[:8]}]
    sites = [s.name for s in walk(model) if s.block]
    blocks = sorted({n.rsplit(".", 2)[0] for n in sites})
    alphas: dict[str, float] = {}
    for block in blocks:
        slots = [Slot((n,), (int_spec(4),)) for n in sites if n.startswith(block + ".")]
        found = Linearity(rows=8).alphas(model, slots, batches, seed=0)
        alphas |= {slot.sites[0]: alpha for slot, alpha in zip(slots, found, strict=True)}
    noise = torch.Generator().manual_seed(1)
    predicted, measured = [], []
    for pattern in range(12):
        square = {n: 0.05 * float(torch.rand(1, generator=noise)) ** 2 * (pattern + 1) / 12 for n in sites}
        weights = {}
        for n in sites:
            W = model.get_submodule(n).weight.detach()
            e = torch.randn(W.shape, generator=noise)
            weights[n] = W + e * (square[n] ** 0.5 * W.norm() / e.norm())
        predicted.append(sum(alphas[n] * square[n] for n in sites))
        measured.append(kl_of(model, [[weights]], batches)[0][0])
    x, y = torch.tensor(predicted).double(), torch.tensor(measured).double()
    r2 = float(1 - (y - x).square().sum() / (y - y.mean()).square().sum())
    claims.invariant(
        "higgs-dp",
        "the sum of alpha t^2 predicts the measured KL with R^2 > 0.9 while t^2 < 0.05",
        r2 > 0.9,
        {"r2": r2, "predicted": predicted, "measured": measured},
    )
