"""Sampled inputs together with the entry of the tables that each belongs to, and ranges fitted on them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.spec import Spec
from hf_quant.stages.range import Extremes, Range
from hf_quant.stats import Reduction, Rows, Seen, Stat, State, Stats


@dataclass(frozen=True, slots=True)
class TimedRows:
    """`Rows` of `[x, e]`: a uniform sample over all entries; the entry e is the tag "timestep"."""

    count: int = 512

    @property
    def reduce(self) -> Mapping[str, Reduction]:
        """As the rows."""
        return Rows(self.count).reduce

    @property
    def two_streams(self) -> bool:
        """One stream."""
        return False

    @property
    def tags(self) -> tuple[str, ...]:
        """The entry of each token."""
        return ("timestep",)

    def start(self, K: int, device: torch.device) -> State:
        """Unfilled rows, a column wider."""
        return Rows(self.count).start(K + 1, device)

    def update(self, state: State, seen: Seen) -> None:
        """Keep the smallest keys of what was kept and what is new."""
        entry = seen.tags["timestep"].to(seen.x_TK.device).float()[:, None]
        Rows(self.count).update(state, Seen(torch.cat([seen.x_TK.float(), entry], 1)))

    def values(self, state: State) -> tuple[Tensor, Tensor]:
        """(x `[R, K]`, entries int64 `[R]`)."""
        rows = Rows(self.count).values(state)
        return rows[:, :-1], rows[:, -1].long()


@dataclass(frozen=True, slots=True)
class TimedRange:
    """Any `Range` on the sampled rows of each entry; an entry without rows covers what was seen of it."""

    range: Range = MseClip(steps=24, floor=0.3, power=2.0)
    rows: int = 2048

    def needs(self, spec: Spec) -> tuple[Stat, ...]:
        """Extremes by timestep, and rows with theirs."""
        return (*Extremes().needs(spec), TimedRows(self.rows))

    def fit_inputs(self, stats: Stats, spec: Spec) -> tuple[Tensor, Tensor | None]:
        """See `InputRange.fit_inputs`."""
        scale, zero = Extremes().fit_inputs(stats, spec)
        timed = TimedRows(self.rows)
        x, entry = timed.values(stats[timed])
        for e in entry.unique().tolist():
            scale_e, zero_e = self.range.fit(x[entry == e], spec)
            scale[e] = scale_e[0]
            if zero is not None and zero_e is not None:
                zero[e] = zero_e[0]
        return scale, zero
