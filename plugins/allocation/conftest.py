"""What the claims of allocations share: the distance of any recipe."""

from collections.abc import Callable

import pytest
import torch

from hf_quant.ledger import true_bits
from hf_quant.recipe import Job, Recipe

Distance = Callable[[Recipe, int], float]


@pytest.fixture(scope="session")
def distance(judge) -> Distance:  # type: ignore[no-untyped-def]
    """KL of tiny-lm to full precision on held-out text, by recipe and seed; checks that the budget is kept."""
    from hf_quant.plugins.conftest import log_probabilities

    known: dict[tuple[str, int], float] = {}

    @torch.no_grad()
    def of(recipe: Recipe, seed: int) -> float:
        key = (repr(recipe), seed)
        if key not in known:
            model = judge.model()
            recipe.quantize(model, Job(data=judge.data(seed), seed=seed, progress=False))
            budget = recipe.allocator.budget if recipe.allocator else None
            if budget is not None and budget.bits is not None:
                assert budget.bits - 0.06 < true_bits(model) <= budget.bits
            log_q = log_probabilities(model, judge.test)
            known[key] = float((judge.expected.exp() * (judge.expected - log_q)).sum(-1).mean())
        return known[key]

    return of
