"""What the claims of allocations share: the distance of any recipe, the same uniform, and chance."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from hf_quant import QuantConfig
from hf_quant.allocation.budget import Budget
from hf_quant.ledger import true_bits
from hf_quant.recipe import Job, Recipe
from hf_quant.stages.allocator import Slot

UNIFORM = 3 + (16 + 3) / 64  # true bits of 3-bit codes in groups of 64, with scales and zero points
Distance = Callable[[Recipe, int], float]


@dataclass(frozen=True)
class Chance:
    """Any slot is as likely as another to be the one that suffers."""

    def losses(self, model, slots: Sequence[Slot], rounded, batches, seed):  # type: ignore[no-untyped-def]
        dice = random.Random(f"{seed}{slots[0].sites}")
        return [tuple(dice.uniform(0.2, 5) * 4.0**-c.grid.bits for c in slot.choices) for slot in slots]


@pytest.fixture(scope="session")
def distance(judge) -> Distance:  # type: ignore[no-untyped-def]
    """KL of tiny-lm to full precision on held-out text, by recipe and seed; checks that the budget is kept."""
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
            known[key], _ = judge.distance(model)
        return known[key]

    return of


@pytest.fixture(scope="session")
def at_three_bits() -> Callable[[str], Recipe]:
    """A method's recipe at the size of uniform 3 bits in groups of 64, from widths 2, 3, 4 and 8; or "uniform"."""

    def of(method: str) -> Recipe:
        budget = Budget(f"{UNIFORM} bits", widths=(2, 3, 4, 8))
        named = "hawq-v2" if method in ("uniform", "chance") else method
        recipe = QuantConfig(named, group_size=64, budget=budget).quantizer()
        assert isinstance(recipe, Recipe)
        assert recipe.allocator is not None
        if method == "uniform":
            return replace(recipe, weights=recipe.allocator.choices[1], allocator=None)
        if method == "chance":
            return replace(recipe, allocator=replace(recipe.allocator, sensitivity=Chance()))
        return recipe

    return of
