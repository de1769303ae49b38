"""Tuner: which codes, fitted for several sites together against what their unit computes? (AdaRound, BRECQ, TIAR)"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from hf_quant.qtensor import QTensor
from hf_quant.sites import Site
from hf_quant.spec import Spec

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of one forward


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Sites that are fitted together.

    Attributes:
        name: unique in the model, for progress and resume.
        module: computes what is to be kept. A block, a window of blocks, or an adapter over the model's own
            submodules (the temporal block of a diffusion model: timesteps -> every projection of them).
        sites: name in the model -> the submodule whose weight is fitted; a site is in one unit only.
        calls: what to feed `module`; None: whatever the data feeds it.
    """

    name: str
    module: nn.Module
    sites: Mapping[str, nn.Module]
    calls: tuple[Call, ...] | None = None


class Units(Protocol):
    """Cuts a model into units, in the order in which they are fitted."""

    def units(self, model: nn.Module, blocks: Sequence[str], sites: Sequence[Site]) -> list[Unit]:
        """Units with disjoint sites; a site in none keeps the solver's codes."""


@dataclass(frozen=True, slots=True)
class BlockUnits:
    """Every block is a unit."""

    def units(self, model: nn.Module, blocks: Sequence[str], sites: Sequence[Site]) -> list[Unit]:
        """One a block that holds sites."""
        of = {b: {s.name: model.get_submodule(s.name) for s in sites if s.block == b} for b in blocks}
        return [Unit(b, model.get_submodule(b), found) for b, found in of.items() if found]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One cached micro-batch of a unit: its arguments on both paths and what full precision makes of the latter."""

    call: Call
    fp_call: Call
    target: Any


class Tuner(Protocol):
    """Fits the rounding of a unit's weights by gradient."""

    def refuses(self, spec: Spec) -> str | None:
        """None when it can fit weights of this spec, else the reason (asked at plan time)."""

    def tune(
        self, unit: Unit, start: Mapping[str, QTensor], examples: Sequence[Example], seed: int
    ) -> dict[str, QTensor]:
        """Site name -> codes; the unit's weights are still float and are left as they were found."""
