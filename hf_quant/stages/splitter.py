"""Splitter: what leaves the weight before rounding?"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hf_quant.runtime.branches import Branch
from hf_quant.spec import Spec
from hf_quant.stages.range import Range
from hf_quant.stats import Stat, Stats


class Splitter(Protocol):
    """Moves part of a weight into full-precision branches (SVDQuant's low rank, sparse outliers)."""

    @property
    def needs(self) -> tuple[Stat, ...]:
        """The statistics it reads."""

    def split(
        self, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> list[tuple[Tensor, tuple[Branch, ...]]]:
        """For each weight `[N_i, K]` of a group, (what is left to round, the branches): `W = rest + sum of branches`.

        Branches read the input before it is rounded. Weights of a group may share a branch's tensors.
        """
