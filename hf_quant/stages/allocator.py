"""Allocator: how many bits where, for a budget? A sensitivity fills a table of losses, a search picks from it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from hf_quant.allocation.budget import Budget
from hf_quant.sites import linear_shape
from hf_quant.spec import Spec
from hf_quant.stages.sampler import Batch


@dataclass(frozen=True, slots=True)
class Slot:
    """One row of the table: sites that get the same choice, and the specs to choose from, by rising size."""

    sites: tuple[str, ...]
    choices: tuple[Spec, ...]


# (site, spec) -> the ORIGINAL weight `[N, K]` rounded so by the recipe's range and solver; the pipeline lends it.
Rounded = Callable[[str, Spec], Tensor]


class Sensitivity(Protocol):
    """Fills the table of losses: what rounding a slot so costs the model (one-site KL, Hutchinson trace)."""

    def losses(
        self, model: nn.Module, slots: Sequence[Slot], rounded: Rounded, batches: Sequence[Batch], seed: int
    ) -> list[tuple[float, ...]]:
        """For each slot the loss of each of its choices.

        Asked block by block, so that a killed run resumes and a block's statistics are all that is in memory: `slots`
        are those of one block. All blocks' losses must be of one scale. The model is left as it was found.
        """


class Search(Protocol):
    """Picks one choice a slot: the least sum of losses whose sum of bits is within the budget."""

    def pick(self, bits: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
        """The index of each slot's choice; `bits` and `losses` are `[slot][choice]`, the smallest choices do fit."""


@dataclass(frozen=True, slots=True)
class Allocator:
    """What the loop needs to spend a budget.

    Attributes:
        choices: the specs a site may get; the plan drops those that no format or solver takes.
        sensitivity: what fills the table.
        search: what picks from it.
        budget: None: the size that the recipe's own `weights` everywhere would have.
    """

    choices: tuple[Spec, ...]
    sensitivity: Sensitivity
    search: Search
    budget: Budget | None = None


@contextmanager
def standing_in(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, some layers (and what is tied to them) compute with other weights: site -> `W_NK`."""
    replaced: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for name, W_NK in weights.items():
            module = model.get_submodule(name)
            found, original = linear_shape(module), module.weight
            assert isinstance(original, nn.Parameter)  # noqa: S101  a float layer
            stored = W_NK.T if found is not None and found[0] == "conv1d" else W_NK
            other = nn.Parameter(stored.to(original.dtype), requires_grad=False)
            for owner in [m for m in model.modules() if m._parameters.get("weight") is original]:
                replaced.append((owner, original))
                owner.weight = other
        yield
    finally:
        for owner, original in reversed(replaced):
            owner.weight = original
