"""Range: how are scale and zero point fitted?"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_quant.qtensor import as_blocks, from_extremes
from hf_quant.spec import Spec
from hf_quant.stats import ByIndex, MinMax, Stat, Stats


class Range(Protocol):
    """Fits the scale (and zero point) of every block of a matrix."""

    def fit(self, W_NK: Tensor, spec: Spec, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(scale, zero), each float32 `spec.blocks(W.shape)`; scale lies on `spec.scale`, an int zero on `spec.grid`.

        `importance_K` weighs the squared error of each input channel (the diagonal of H); None weighs all alike.
        """


@dataclass(frozen=True, slots=True)
class AbsMaxRange:
    """Cover every value: min-max with a zero point, largest magnitude without."""

    def fit(self, W_NK: Tensor, spec: Spec, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Range.fit`."""
        blocks = as_blocks(W_NK, spec)
        return from_extremes(blocks.amin(-1), blocks.amax(-1), spec)


class InputRange(Protocol):
    """Fits the static range of a layer's input, or the table of them when the spec has an index."""

    def needs(self, spec: Spec) -> tuple[Stat, ...]:
        """The statistics it reads for inputs of this spec."""

    def fit_inputs(self, stats: Stats, spec: Spec) -> tuple[Tensor, Tensor | None]:
        """(scale, zero), each float32 `[spec.entries, 1]`."""


@dataclass(frozen=True, slots=True)
class Extremes:
    """Cover every value that calibration saw; an entry it never reached takes the range of its nearest neighbour."""

    def needs(self, spec: Spec) -> tuple[Stat, ...]:
        """Extremes, by index where there is a table."""
        return (MinMax() if spec.entries == 1 else ByIndex(MinMax(), spec.index, spec.entries),)

    def fit_inputs(self, stats: Stats, spec: Spec) -> tuple[Tensor, Tensor | None]:
        """See `InputRange.fit_inputs`."""
        state = stats[self.needs(spec)[0]]
        low, high = (state[name].reshape(-1, 1) for name in ("min", "max"))
        if "seen" in state:
            reached = state["seen"].nonzero()[:, 0]
            away = (torch.arange(spec.entries, device=low.device)[:, None] - reached).abs()
            low, high = low[reached[away.argmin(1)]], high[reached[away.argmin(1)]]
        return from_extremes(low, high, spec)
