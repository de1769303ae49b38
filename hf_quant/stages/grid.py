"""GridChoice: which representable values, of the width that the recipe says?"""

from typing import Protocol

from torch import Tensor

from hf_quant.spec import Spec
from hf_quant.stats import Stat, Stats


class GridChoice(Protocol):
    """Chooses the grids of one site from its data (LLM-FP4: how many exponent bits)."""

    @property
    def needs(self) -> tuple[Stat, ...]:
        """The statistics it reads."""

    def choose(self, W_NK: Tensor, stats: Stats, weights: Spec, inputs: Spec | None) -> tuple[Spec, Spec | None]:
        """The specs of the site, each equal to the recipe's but for a grid of the same width: sizes do not change."""
