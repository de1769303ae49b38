"""Repair: what is added after rounding?"""

from typing import Protocol

from torch import Tensor

from hf_quant.qtensor import QTensor
from hf_quant.runtime.branches import Branch
from hf_quant.stats import Stat, Stats


class Repair(Protocol):
    """Makes up for the rounding error with branches (LoRC, QERA)."""

    @property
    def needs(self) -> tuple[Stat, ...]:
        """The statistics it reads."""

    def repair(self, W_NK: Tensor, q: QTensor, stats: Stats) -> tuple[Branch, ...]:
        """Branches to add to `q`, the codes of `W_NK` (of what the splitter left of it)."""
