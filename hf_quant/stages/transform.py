"""Transform: what function-preserving rewrite first? A transform returns a value; `hf_quant.rewrite` folds it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hf_quant.spec import Spec
from hf_quant.stages.range import Range
from hf_quant.stats import Stat, Stats


@dataclass(frozen=True, slots=True, eq=False)
class Diagonal:
    """Divide input channel k by `s_K[k]` and multiply column k of every weight that reads it by the same."""

    s_K: Tensor


Rewrite = Diagonal  # rotations and shifts join this union as values of their own


class Transform(Protocol):
    """Looks at one group of sites that read the same input, and proposes a rewrite."""

    @property
    def needs(self) -> tuple[Stat, ...]:
        """The statistics it reads, of the full-precision input."""

    def propose(
        self, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> Rewrite | None:
        """The rewrite for the group's weights `[N_i, K]`, or None to leave it as it is."""
